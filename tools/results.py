"""Trains and measures what RESULTS.md reports, and writes its tables and pictures from the measured rows.

The command is linear_moe/commands/results.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("results"))
