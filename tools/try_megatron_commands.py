"""Tries the training commands of Megatron-LM's users on a CPU, with --token-mixer mom and without.

The command is linear_moe/commands/try_megatron_commands.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("try_megatron_commands"))
