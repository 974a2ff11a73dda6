"""Draws a run's losses and memory load from its TensorBoard files.

    python tools/plot_run.py --tensorboard-dir runs/demo/tensorboard --output runs/demo/plots
    python tools/plot_run.py --tensorboard-dir DIR --output DIR --reference-loss 6.91 "unigram entropy"

Writes loss.png and, where the run has Mixture-of-Memories layers, memory_load.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from linear_moe.watching.plots import LOAD, PlotError, plot_losses, plot_memory_load, read_scalars


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns 0, or 1 when there is nothing to draw. Raises SystemExit(2) for a wrong command line."""
    parser = argparse.ArgumentParser(description="Draws a run's losses and memory load from its TensorBoard files.")
    parser.add_argument("--tensorboard-dir", type=Path, required=True, help="Folder of the event files.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for the pictures.")
    parser.add_argument(
        "--reference-loss",
        nargs=2,
        action="append",
        default=[],
        metavar=("NATS", "LABEL"),
        help="A horizontal line in the picture of the losses; may be given several times.",
    )
    args = parser.parse_args(argv)
    try:
        references = [(float(nats), label) for nats, label in args.reference_loss]
    except ValueError as error:
        parser.error(f"--reference-loss wants a number of nats per token, then a label: {error}")
    try:
        scalars = read_scalars(args.tensorboard_dir)
        pictures = [args.output / "loss.png"]
        plot_losses(scalars, pictures[0], references)
        if any(LOAD.fullmatch(name) for name in scalars):
            pictures.append(args.output / "memory_load.png")
            plot_memory_load(scalars, pictures[1])
    except (PlotError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, pictures)))
    return 0
