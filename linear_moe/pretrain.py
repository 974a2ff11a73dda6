"""Pretrains a Mixture-of-Memories (or softmax attention) language model with Megatron's training loop.

    python -m linear_moe.pretrain --token-mixer mom <Megatron's arguments>          (or under torchrun -m)

Every argument of Megatron keeps its meaning. On a machine without a GPU the processes communicate over gloo.
"""

from __future__ import annotations

import os
import sys
import traceback

import torch

from linear_moe.entry.log import announce, show_log
from linear_moe.entry.machine import add_machine_defaults, prepare_machine


def main() -> None:
    """Parses the command line, builds the model and trains it."""
    prepare_machine()

    # Without a GPU, Megatron can be imported only after the patches of the machine.
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    from linear_moe.entry import arguments, data
    from linear_moe.entry.gpt_model import gpt_model
    from linear_moe.watching.reporter import WholeLineReporter

    arguments.PATCH.apply()
    WholeLineReporter().patch().apply()
    announce()
    args = parse_and_validate_args(extra_args_provider=add_machine_defaults)
    check_entry(args)
    data.check_data_paths(args)
    data.check_vocabulary(args)
    args.contiguous_context_slices = data.cuts_contiguously(args)
    container = pretrain_cfg_container_from_args(args, gpt_model(args))
    pretrain(container, data.provide_datasets, ModelType.encoder_or_decoder, data.forward_step)


def check_entry(args) -> None:
    """Raises ValueError for the models and the data that only Megatron-LM's own scripts can build."""
    from linear_moe.config import refuse
    from linear_moe.entry.arguments import OUR_SPEC

    spec = None if args.spec is None else " ".join(args.spec)
    hybrid, variant = args.hybrid_layer_pattern, args.experimental_attention_variant
    launcher = "run Megatron-LM's own script: python -m linear_moe path/to/"
    refuse("linear_moe.pretrain does not take", [
        (hybrid, f"--hybrid-layer-pattern {hybrid}", launcher + "pretrain_hybrid.py"),
        (spec and spec != OUR_SPEC, f"--spec {spec}", "leave it out"),
        (args.sft, "--sft", launcher + "pretrain_gpt.py"),
        (args.fim_data, "--fim-data", launcher + "pretrain_gpt.py"),
        (variant, f"--experimental-attention-variant {variant}", launcher + "pretrain_gpt.py"),
    ])  # fmt: skip


def _explain(error: BaseException) -> str:
    """The error's message; for an error without a message (a bare assert), the line that raised it."""
    if str(error):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {last.filename}:{last.lineno}: {last.line}"


def run() -> int:
    """Calls main(), and prints an error in one line. Returns the exit status."""
    show_log(megatron_too=True)
    try:
        main()
    except Exception as error:
        if os.environ.get("MOM_TRACEBACK"):
            raise
        print(f"error: {_explain(error)}\n(MOM_TRACEBACK=1 shows where)", file=sys.stderr, flush=True)
        return 1
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run())
