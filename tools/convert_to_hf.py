"""Converts a Megatron checkpoint of a Mixture-of-Memories model to the Hugging Face format.

The command is linear_moe/commands/convert_to_hf.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("convert_to_hf"))
