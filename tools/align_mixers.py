"""Makes a model with memories of a Transformer, and trains the new token mixers alone against its hidden states.

The command is linear_moe/commands/align_mixers.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("align_mixers"))
