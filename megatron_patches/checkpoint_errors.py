"""What went wrong with a checkpoint, in one message that names the folder, the cause and what to do.

Megatron passes on whatever torch raises: for a full disk or a damaged file that is CheckpointException, which is no
Exception, with a traceback of every rank in its text. Some problems end the run with exit status 0 (a bare sys.exit).
"""

import logging
import pickle
import shutil
from contextlib import suppress
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_patches.checkpoint_folder import (
    CheckpointError,
    complete_iterations,
    is_complete,
    iteration_folder,
)
from megatron_patches.checkpoint_tracker import TRACKER, read_tracker
from megatron_patches.patch import Patch, wrap
from megatron_patches.trusted_checkpoints import UnsafeCheckpoint

logger = logging.getLogger(__name__)

SHAPE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels", "num_query_groups", "swiglu",
    "add_bias_linear", "add_qkv_bias", "normalization", "qk_layernorm", "untie_embeddings_and_output_weights",
    "position_embedding_type", "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
    "mtp_num_layers",
)  # fmt: skip
"""Arguments of Megatron that decide which weights a model has and how large they are."""
_OPTION = {"add_bias_linear": "--disable-bias-linear"}
"""Options that are not named after their argument."""


def cause(error: BaseException) -> str:
    """The first failure behind an error, in one line: its type and text, without tracebacks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    while error.__cause__ is not None and not isinstance(error, CheckpointError):
        error = error.__cause__
    if isinstance(error, CheckpointException):
        return "another rank failed, which tells why"
    text = " ".join(str(error).split())
    if isinstance(error, UnsafeCheckpoint):
        return text
    passed_on = "Worker failure: "  # Megatron's own words around the text of a CheckpointError
    if isinstance(error, CheckpointError | OSError) or text.startswith(passed_on):
        return text.removeprefix(passed_on)
    told = f"{type(error).__name__}: {text}"
    damaged = isinstance(error, pickle.UnpicklingError | EOFError) or "PytorchStreamReader" in text
    return f"a file is damaged ({told})" if damaged else told


def different_arguments(saved, args) -> list[str]:
    """One sentence for each argument of SHAPE with another value in the checkpoint than in this run."""
    names = [name for name in SHAPE if hasattr(saved, name) and hasattr(args, name)]
    if not (saved.group_query_attention or args.group_query_attention):
        names.remove("num_query_groups")  # a number that nothing reads then
    different = [name for name in names if getattr(saved, name) != getattr(args, name)]
    if "hidden_size" in different or "num_attention_heads" in different:  # from which the defaults of these follow
        different = [name for name in different if name not in ("ffn_hidden_size", "kv_channels")]
    return [
        f"{_OPTION.get(name, '--' + name.replace('_', '-'))} was {getattr(saved, name)} when the checkpoint was "
        f"written, this run has {getattr(args, name)}"
        for name in different
    ]


def _others(folder: Path, iteration: int | None = None) -> str:
    """What a user can load instead."""
    others = [number for number in complete_iterations(folder) if number != iteration]
    if not others:
        return f"there is no other complete checkpoint in {folder}"
    return f"complete checkpoints in {folder}: iterations {', '.join(map(str, others))} (--ckpt-step takes one)"


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free on its disk"


def _write_error(folder: Path, iteration: int, error: BaseException) -> CheckpointError:
    others = [number for number in complete_iterations(folder) if number != iteration]
    resumed = f"a restart resumes from iteration {others[-1]}" if others else "no earlier checkpoint is complete"
    return CheckpointError(
        f"the checkpoint of iteration {iteration} cannot be written to {folder}: {cause(error)} "
        f"({_free(folder)}); {resumed}"
    )


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _save(save_checkpoint, iteration, *positional, **keywords):
    """Megatron's save_checkpoint; what was written of a checkpoint that fails is removed."""
    from megatron.training import get_args

    args = get_args()
    if args.save is None or keywords.get("non_persistent_ckpt"):
        return save_checkpoint(iteration, *positional, **keywords)
    folder = Path(args.save)
    unfinished = iteration_folder(folder, iteration)
    try:
        if _is_first_rank():  # a checkpoint that is written over is not complete
            (unfinished / "metadata.json").unlink(missing_ok=True)
        if args.async_save:
            _in_the_background.append((folder, iteration))
        return save_checkpoint(iteration, *positional, **keywords)
    except (CheckpointException, OSError) as error:
        _remove(unfinished)
        raise _write_error(folder, iteration, error) from error


def _remove(unfinished: Path) -> None:
    if _is_first_rank() and not is_complete(unfinished):
        shutil.rmtree(unfinished, ignore_errors=True)


_in_the_background: list[tuple[Path, int]] = []
"""Folder and iteration of the checkpoints of --async-save, the oldest first."""


def _finalize(maybe_finalize_async_save, *positional, **keywords):
    """The place where an asynchronous save fails."""
    try:
        return maybe_finalize_async_save(*positional, **keywords)
    except (CheckpointException, OSError) as error:
        folder, iteration = next(one for one in _in_the_background if not is_complete(iteration_folder(*one)))
        _remove(iteration_folder(folder, iteration))
        raise _write_error(folder, iteration, error) from error


def _load(load_base_checkpoint, load_dir, args, rank0=False, *positional, **keywords):
    """Megatron's _load_base_checkpoint, which reads the files: of all of a checkpoint, or of its arguments (rank0)."""
    try:
        return load_base_checkpoint(load_dir, args, rank0, *positional, **keywords)
    except CheckpointError:
        raise
    except (Exception, CheckpointException, SystemExit) as error:
        folder = Path(str(load_dir))
        if isinstance(error, SystemExit):
            raise _refusal(error, folder, args) from error
        if not rank0 and (differences := _differences(load_base_checkpoint, load_dir, args)):
            raise CheckpointError(other_model(folder, differences)) from error
        iteration = _iteration(folder, args)
        checkpoint = folder if iteration is None else iteration_folder(folder, iteration)
        raise CheckpointError(
            f"the checkpoint {checkpoint} cannot be loaded: {_damage(checkpoint) or cause(error)}; "
            f"{_others(folder, iteration)}"
        ) from error


def _refusal(error: SystemExit, folder: Path, args) -> BaseException:
    """An error in the place of sys.exit(), which would end the run with status 0."""
    if error.code not in (None, 0):
        return error
    if args.exit_on_missing_checkpoint and not (folder / "latest_checkpointed_iteration.txt").exists():
        return CheckpointError(
            f"--exit-on-missing-checkpoint: {folder} has no latest_checkpointed_iteration.txt; {_others(folder)}"
        )
    return CheckpointError(f"the checkpoint in {folder} cannot be loaded, for the reason that Megatron printed above")


def other_model(folder: Path | str, differences: list[str]) -> str:
    """A message for what `different_arguments` found."""
    return (
        f"the checkpoint in {folder} belongs to another model: {'; '.join(differences)}: give the values of the "
        "checkpoint, or --use-checkpoint-args"
    )


def _damage(checkpoint: Path) -> str | None:
    """The first file of a torch_dist checkpoint that is missing or shorter than its metadata says."""
    if not (checkpoint / ".metadata").is_file():
        return None if checkpoint.is_dir() else "there is no such folder"
    try:
        places = FileSystemReader(checkpoint).read_metadata().storage_data.values()
    except UnsafeCheckpoint as error:
        return cause(error)
    except Exception as error:
        return f".metadata is damaged ({cause(error)})"
    ends: dict[str, int] = {}
    for place in places:
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    for name, end in sorted(ends.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < end:
            return f"{name} was cut short: {path.stat().st_size} bytes are there, {end} are described"
    return None


def _iteration(folder: Path, args) -> int | None:
    if getattr(args, "ckpt_step", None):
        return args.ckpt_step
    with suppress(OSError, ValueError):
        return int(read_tracker(folder / TRACKER))
    return None


def _differences(load_base_checkpoint, load_dir, args) -> list[str]:
    try:
        state = load_base_checkpoint(load_dir, args, True)[0]
    except (Exception, CheckpointException, SystemExit):
        return []
    return different_arguments(state["args"], args) if state and "args" in state else []


def _refuse_silent_exit(load_checkpoint, *positional, **keywords):
    from megatron.training import get_args

    try:
        return load_checkpoint(*positional, **keywords)
    except SystemExit as error:
        args = get_args()
        raise _refusal(error, Path(str(args.load)), args) from error


PATCH = Patch(
    name="checkpoint-errors",
    reason="a checkpoint that cannot be written or read ends in a traceback of torch, or with exit status 0",
    removed_when="save_checkpoint and load_checkpoint raise an Exception that names the folder and the cause",
    targets=(
        wrap("megatron.training.checkpointing", "save_checkpoint", _save),
        wrap("megatron.training.async_utils", "maybe_finalize_async_save", _finalize),
        wrap("megatron.training.checkpointing", "_load_base_checkpoint", _load),
        wrap("megatron.training.checkpointing", "load_checkpoint", _refuse_silent_exit),
    ),
)
