"""Multi-query associative recall: MoM beside baselines of equal state, parameters and time, trained on the spot.

The command is linear_moe/commands/recall.py.
"""

import sys

from linear_moe.commands import run

if __name__ == "__main__":
    sys.exit(run("recall"))
