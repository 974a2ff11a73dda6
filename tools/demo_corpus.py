"""Gathers a small training corpus from what every machine has: the Python installation's own sources and texts.

The command is linear_moe/commands/demo_corpus.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("demo_corpus"))
