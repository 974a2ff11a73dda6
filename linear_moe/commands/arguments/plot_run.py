"""Draws a run's losses and memory load from its TensorBoard files.

    python tools/plot_run.py --tensorboard-dir runs/demo/tensorboard --output runs/demo/plots
    python tools/plot_run.py --tensorboard-dir DIR --output DIR --reference-loss 6.91 "unigram entropy"

Writes loss.png and, where the run has Mixture-of-Memories layers, memory_load.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import not_negative, path


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--tensorboard-dir", type=path, required=True, help="folder of the event files")
    parser.add_argument("--output", type=path, required=True, help="folder for the pictures")
    parser.add_argument(
        "--reference-loss",
        nargs=2,
        action="append",
        default=[],
        metavar=("NATS", "LABEL"),
        help="a horizontal line in the picture of the losses; may be given several times",
    )
    args = parser.parse_args(argv)
    try:
        args.reference_loss = [(not_negative(text), label) for text, label in args.reference_loss]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--reference-loss {error} of nats per token, then a label")
    return args
