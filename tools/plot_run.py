"""Draws a run's losses and memory load from its TensorBoard files. The command is linear_moe/commands/plot_run.py."""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("plot_run"))
