"""Tasks of lm-evaluation-harness on a model: an export, or a Megatron checkpoint by Megatron's own forward pass.

    python tools/evaluate.py --load runs/demo/hf --suite recall
    python tools/evaluate.py --load runs/demo/checkpoints --tasks wikitext --output runs/demo/evaluation.json
    torchrun --nproc-per-node 2 -m linear_moe.cli evaluate --load runs/demo/checkpoints --suite commonsense \\
        --tensor-model-parallel-size 2

A checkpoint of any layout runs in any other: options that are not listed here go to Megatron. The
tasks' data come from the Hugging Face hub or its cache (HF_HOME; HF_HUB_OFFLINE=1 without a network). A context follows
the end-of-document token, as in training; a context that is too long loses its beginning. Prints a table, for a suite
beside the MoM paper's averages.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import DTYPES, path, whole
from linear_moe.evaluation.suites import SUITES


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """``words`` of the result holds what is left for Megatron."""
    parser = command_parser(__doc__)
    parser.allow_abbrev = False  # words that are no option here are Megatron's
    model = parser.add_argument_group("model")
    model.add_argument("--load", type=path, required=True, help="folder of an export or of Megatron checkpoints")
    model.add_argument("--iteration", type=whole(0), help="Megatron checkpoint to use [the latest]")
    model.add_argument("--tokenizer", type=path, help="folder of the tokenizer [the model's]")
    model.add_argument("--dtype", choices=DTYPES, help="type to compute in [as stored; checkpoints: float32 on a CPU, "
                       "bfloat16 on a GPU]")  # fmt: skip
    model.add_argument("--device", choices=("cuda", "cpu"), help="device for an export [cuda where there is a GPU]")
    model.add_argument(
        "--trust-checkpoint", action="store_true", help="run whatever code a Megatron checkpoint's files name"
    )
    tasks = parser.add_argument_group("tasks")
    which = tasks.add_mutually_exclusive_group(required=True)
    which.add_argument("--suite", choices=tuple(SUITES), help="a set of tasks of this project")
    which.add_argument("--tasks", nargs="+", metavar="TASK", help="tasks by their names in lm-evaluation-harness")
    tasks.add_argument("--include-path", type=path, metavar="DIR", help="folder with further tasks")
    tasks.add_argument("--num-fewshot", type=whole(0, 1000), help="examples before a question [as the task says]")
    tasks.add_argument("--limit", type=whole(1), help="questions that are asked of a task [all]")
    tasks.add_argument("--max-length", type=whole(16), help="tokens read at once [the suite's; 2048]")
    tasks.add_argument("--no-document-start", action="store_true", help="no end-of-document token before a context")
    tasks.add_argument(
        "--batch-size", type=whole(1), default=8, help="texts that a process computes at once [%(default)s]"
    )
    tasks.add_argument("--output", type=path, metavar="FILE", help="file to write all results to, as JSON")
    args, args.words = parser.parse_known_args(argv)
    return args
