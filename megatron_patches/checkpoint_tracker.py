"""The file that names the newest checkpoint is never half-written, and is understood or refused when it is read.

Megatron opens latest_checkpointed_iteration.txt for writing in place: a full disk or a kill leaves the file empty. A
run that reads an empty file ends with exit status 0 and no message.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_patches.checkpoint_folder import (
    CheckpointError,
    complete_iterations,
    is_complete,
    iteration_folder,
    warn,
)
from megatron_patches.patch import Patch, Target, wrap

TRACKER = "latest_checkpointed_iteration.txt"


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[io.TextIOBase]:
    """A text file to write to that takes the name `path` once all of it is on the disk."""
    beside = f"{path}.partial"
    try:
        with open(beside, "w") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def read_tracker(path: str | os.PathLike) -> str:
    """What the file says: an iteration's number, or "release". Where it names no complete checkpoint, the newest
    iteration of its folder that is complete, with a warning.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    content = path.read_bytes().decode(errors="replace").strip()
    if content == "release":
        return content
    problem = "is not the number of an iteration"
    if re.fullmatch(r"[0-9]{1,18}", content):
        checkpoint = iteration_folder(path.parent, int(content))
        if is_complete(checkpoint) or _is_legacy(checkpoint):
            return content
        problem = f"names a checkpoint that is {'not complete' if checkpoint.is_dir() else 'not there'}"
    found = complete_iterations(path.parent)
    told = f"{path} holds {content[:80]!r}, which {problem}"
    if not found:
        raise CheckpointError(
            f"{told}, and there is no complete checkpoint in {path.parent}: remove the file to start from the beginning"
        )
    warn(f"{told}: the newest complete checkpoint is taken, iteration {found[-1]}")
    return str(found[-1])


def _is_legacy(checkpoint: Path) -> bool:
    """Whether a folder is in one of Megatron's formats that have no mark for a complete checkpoint."""
    return checkpoint.is_dir() and not any(checkpoint.glob("*.distcp")) and any(checkpoint.iterdir())


def _open(open_file, path, mode="r", *positional, **keywords):
    """Megatron's open(), with another way to the tracker file."""
    from megatron.core.msc_utils import MultiStorageClientFeature

    if Path(str(path)).name != TRACKER or MultiStorageClientFeature.is_enabled():
        return open_file(path, mode, *positional, **keywords)
    return written_whole(path) if mode == "w" else io.StringIO(read_tracker(path))


class _Storage:
    """The object through which checkpointing.py reaches files."""

    def __init__(self, storage):
        self._storage = storage

    def __getattr__(self, name):
        return getattr(self._storage, name)

    def open(self, *positional, **keywords):
        return _open(self._storage.open, *positional, **keywords)


def patch() -> Patch:
    """To be called when megatron.core may be imported."""
    from megatron.core import msc_utils

    module = "megatron.training.checkpointing"
    has_storage = hasattr(msc_utils, "maybe_msc")  # core_v0.18 has a function
    return Patch(
        name="checkpoint-tracker",
        reason="latest_checkpointed_iteration.txt is written in place; an empty one ends a run with exit status 0",
        removed_when="save_checkpoint renames the file into its place, and read_metadata raises an error",
        targets=(Target(module, "maybe_msc", _Storage) if has_storage else wrap(module, "open_file", _open),),
    )
