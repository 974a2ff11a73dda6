"""Writes text with a Mixture-of-Memories model: an export in the Hugging Face format, or a Megatron checkpoint.

The command is linear_moe/commands/generate.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("generate"))
