"""Draws a run's losses and memory load from its TensorBoard files.

    python tools/plot_run.py --tensorboard-dir runs/demo/tensorboard --output runs/demo/plots
    python tools/plot_run.py --tensorboard-dir DIR --output DIR --reference-loss 6.91 "unigram entropy"

Writes loss.png and, where the run has Mixture-of-Memories layers, memory_load.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands import run_command
from linear_moe.commands.values import not_negative, path
from linear_moe.watching.run_plots import LOAD, PlotError, plot_losses, plot_memory_load, read_scalars


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for event files with nothing to draw."""
    args = parse_arguments(argv)
    return run_command("plot_run.py", lambda: plot(args), PlotError)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
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


def plot(args: argparse.Namespace) -> None:
    """Draws the pictures and prints their paths. Raises PlotError."""
    scalars = read_scalars(args.tensorboard_dir)
    pictures = [args.output / "loss.png"]
    plot_losses(scalars, pictures[0], args.reference_loss)
    if any(LOAD.fullmatch(name) for name in scalars):
        pictures.append(args.output / "memory_load.png")
        plot_memory_load(scalars, pictures[1])
    print("\n".join(map(str, pictures)))
