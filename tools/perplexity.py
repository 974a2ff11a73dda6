"""Perplexity of a text by position: how a model's loss falls along its context, far past the training length.

The command is linear_moe/commands/perplexity.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("perplexity"))
