"""Pretrains a Mixture-of-Memories (or softmax attention) language model with Megatron's training loop.

    python -m linear_moe.pretrain --token-mixer mom <Megatron's arguments>          (or under torchrun -m)

Every argument of Megatron keeps its meaning. On a machine without a GPU the processes communicate over gloo.

    --log-file FILE   what is not on the screen [log.txt in the folder of --save or --tensorboard-dir]
    --verbose         everything on the screen, as Megatron prints it
    --help-mom        the arguments of this project alone
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from linear_moe.entry.log import QuietStreams, show_log
from linear_moe.entry.machine import add_machine_defaults, end_process_groups, prepare_machine
from megatron_patches import releases

FIRST_RELEASE = (0, 19)


def main(streams: QuietStreams) -> None:
    """Parses the command line, builds the model and trains it."""
    check_release()
    prepare_machine()

    # Without a GPU, Megatron can be imported only after the patches of the machine.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from linear_moe.entry import arguments, banner, data
    from linear_moe.entry.model import model_config
    from linear_moe.layer import checkpoint_names, memory_symbol
    from linear_moe.watching.reporter import WholeLineReporter

    arguments.PATCH.apply()
    memory_symbol.PATCH.apply()  # before Megatron reads the pattern of the layers
    checkpoint_names.PATCH.apply()
    WholeLineReporter(lambda model: banner.show(streams, args, model, tokens)).patch().apply()
    args = parse_and_validate_args(extra_args_provider=add_machine_defaults)
    check_entry(args)
    tokens = data.check_data_paths(args)
    data.check_vocabulary(args)
    data.keep_end_of_document(args)
    args.contiguous_context_slices = data.cuts_contiguously(args)
    container = pretrain_cfg_container_from_args(args, model_config(args))
    pretrain(container, data.provide_datasets, ModelType.encoder_or_decoder, data.forward_step)


def check_release() -> None:
    """Raises RuntimeError for a Megatron without what this module builds on."""
    version = releases.installed_megatron_core()
    if version is None:
        raise RuntimeError(f"megatron-core is not installed for {sys.executable}: pip install 'linear-moe[train]'")
    if tuple(map(int, version.split(".")[:2])) < FIRST_RELEASE:
        raise RuntimeError(
            f"linear_moe.pretrain needs megatron-core {'.'.join(map(str, FIRST_RELEASE))} or newer, and {version} is "
            "installed: pip install -U megatron-core; or run Megatron-LM's own script, core_v0.18's too: "
            "python -m linear_moe path/to/pretrain_gpt.py"
        )


def check_entry(args) -> None:
    """Raises ValueError for the models and the data that only Megatron-LM's own scripts can build."""
    from linear_moe.config import OUR_SPEC, refuse

    spec = None if args.spec is None else " ".join(args.spec)
    variant = args.experimental_attention_variant
    launcher = "run Megatron-LM's own script: python -m linear_moe path/to/"
    refuse("linear_moe.pretrain does not take", [
        (spec and spec != OUR_SPEC, f"--spec {spec}", "leave --spec out"),
        (args.fim_data, "--fim-data", launcher + "pretrain_gpt.py"),
        (variant, f"--experimental-attention-variant {variant}", launcher + "pretrain_gpt.py"),
    ])  # fmt: skip


def _explain(error: BaseException) -> str:
    """The error's message; for an error without a message (a bare assert), the line that raised it."""
    if str(error):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.filename}:{last.lineno}: {last.line}"


def take_option(words: list[str], name: str) -> str | None:
    """Removes ``name VALUE`` or ``name=VALUE`` from a command line, and returns the value; None where there is none."""
    for place, word in enumerate(words):
        if word == name and place + 1 < len(words):
            value = words[place + 1]
            del words[place : place + 2]
            return value
        if word.startswith(f"{name}="):
            del words[place]
            return word.partition("=")[2]
    return None


def run() -> int:
    """Calls main(), and prints an error in one line. Returns the exit status."""
    if "--verbose" in sys.argv:
        sys.argv.remove("--verbose")
        os.environ["MOM_VERBOSE"] = "1"
    log_file = take_option(sys.argv, "--log-file")
    streams = QuietStreams()
    if log_file:
        streams.log.open(log_path(log_file))
    show_log(streams=streams)
    try:
        main(streams)
    except Exception as error:
        streams.end(failed=True)
        if os.environ.get("MOM_TRACEBACK"):
            raise
        print(f"error: {_explain(error)}\n(MOM_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        return 1
    except BaseException as end:  # Megatron's own exits, --help, and an interrupt
        streams.end(failed=isinstance(end, SystemExit) and end.code not in (None, 0))
        raise
    end_process_groups()
    streams.end()
    return 0


def log_path(file: str) -> Path:
    """The log file of this machine: the machines of one run have a file each."""
    path, machine = Path(file), os.environ.get("GROUP_RANK", "0")
    return path if machine == "0" else path.with_stem(f"{path.stem}-node{machine}")


if __name__ == "__main__":
    sys.exit(run())
