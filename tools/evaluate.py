"""Tasks of lm-evaluation-harness on an export, or on a Megatron checkpoint in any layout of processes.

The command is linear_moe/commands/evaluate.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
