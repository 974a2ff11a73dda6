"""Turns text into the `.bin` and `.idx` files that Megatron trains on.

The command is linear_moe/commands/preprocess_data.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("preprocess_data"))
