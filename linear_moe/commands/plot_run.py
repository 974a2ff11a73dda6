"""Draws a run's losses and memory load from its TensorBoard files.

The command line is linear_moe/commands/arguments/plot_run.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands import run_command
from linear_moe.commands.arguments.plot_run import parse_arguments
from linear_moe.watching.run_plots import LOAD, PlotError, plot_losses, plot_memory_load, read_scalars


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for event files with nothing to draw."""
    args = parse_arguments(argv)
    return run_command("plot_run.py", lambda: plot(args), PlotError)


def plot(args: argparse.Namespace) -> None:
    """Draws the pictures and prints their paths. Raises PlotError."""
    scalars = read_scalars(args.tensorboard_dir)
    pictures = [args.output / "loss.png"]
    plot_losses(scalars, pictures[0], args.reference_loss)
    if any(LOAD.fullmatch(name) for name in scalars):
        pictures.append(args.output / "memory_load.png")
        plot_memory_load(scalars, pictures[1])
    print("\n".join(map(str, pictures)))
