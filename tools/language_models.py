"""Language models on real text that differ in the token mixer alone, trained by Megatron, measured on held-out text.

The command is linear_moe/commands/language_models.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("language_models"))
