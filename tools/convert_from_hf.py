"""Converts a Mixture-of-Memories model in the Hugging Face format (FLA's) to a Megatron checkpoint.

The command is linear_moe/commands/convert_from_hf.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("convert_from_hf"))
