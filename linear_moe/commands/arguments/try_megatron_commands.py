"""Tries the training commands of Megatron-LM's users on a CPU, with --token-mixer mom and without.

    python tools/try_megatron_commands.py path/to/Megatron-LM --output runs/megatron_commands --jobs 2

Reads the argument sets of Megatron-LM's functional tests (tests/functional_tests/test_cases), the shell scripts under
examples/ and a file of public scripts, shrinks each to at most four processes and a few small layers, and runs it. A
run trains, is refused with a line before its first step, or fails; a loss that does not move and a gradient norm that
collapses count as failed. Sets that are the same command when shrunk are run once. A run with memories that trains is
resumed from its checkpoint at half, and must print the same digits. Finished runs are rows of commands.csv and are not
repeated: a stopped call goes on when it is given again. Beside commands.csv: table.md, and a log for each run. The
shell scripts under examples/ are started, with the training programs replaced: give a clone that you trust.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import path, positive, whole


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("clone", type=path, help="a clone of Megatron-LM, core_v0.19.0")
    parser.add_argument("--output", type=path, required=True, metavar="DIR", help="folder of rows, table and logs")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="sets whose name contains one of these")
    parser.add_argument("--exactly", nargs="+", default=[], metavar="NAME", help="the sets with these names")
    parser.add_argument("--kinds", action="store_true", help="one set of each kind instead of every set")
    parser.add_argument(
        "--jobs", type=whole(1), default=1, help="runs at a time, each of up to 4 processes [%(default)s]"
    )
    parser.add_argument(
        "--limit", type=positive, default=300, metavar="SECONDS", help="longest time of one run [%(default)s]"
    )
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="after this time, start no run"
    )
    parser.add_argument("--again", nargs="*", metavar="RESULT", help="repeat finished runs with these results [fails]")
    parser.add_argument("--list", action="store_true", help="print the shrunk commands, and run nothing")
    return parser.parse_args(argv)
