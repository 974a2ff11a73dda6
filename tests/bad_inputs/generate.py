"""Draws bad inputs with a seed, runs them and prints a table of the faults.

PYTHONPATH=.:tests python tests/bad_inputs/generate.py [--seed 0] [--count N] [--only api] [--part 1/4]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from api_cases import api_cases
from command_cases import command_cases
from judge import Case, draw, run_apart, table, untouched
from script_cases import script_cases
from training_cases import setting_cases, training_cases

SOURCES = {"api": api_cases, "commands": command_cases, "script": script_cases, "settings": setting_cases,
           "training": training_cases}  # fmt: skip
"""Of every kind of call, the function that makes its cases, for which it may write into a folder."""


def run(cases: list[Case]) -> dict[Case, str]:
    """The cases that end in a fault, each with its fault."""
    faults = {}
    for case in cases:
        if (fault := run_apart(case)) is not None:
            faults[case] = fault
            print(f"fault: {case}: {' '.join(fault.split())[:200]}", flush=True)
    return faults


def _part(text: str) -> tuple[int, int]:
    number, of = map(int, text.split("/"))
    return number, of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--target", help="cases of one call or command")
    parser.add_argument("--argument", help="cases of one argument")
    parser.add_argument("--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th case, from the I-th on")
    parser.add_argument("--only", choices=SOURCES, nargs="+", default=list(SOURCES))
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        every = [case for name in args.only for case in SOURCES[name](Path(folder, name))]
        every = [case for case in every if args.target in (None, case.target)]
        every = [case for case in every if args.argument in (None, case.argument)]
        cases = draw(every, args.count, args.seed)[args.part[0] - 1 :: args.part[1]]
        with untouched() as appeared:
            faults = run(cases)
    print(table(faults))
    print(f"{len(cases)} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    if appeared:
        print(f"appeared in the repository: {appeared}")
    return 1 if faults or appeared else 0


if __name__ == "__main__":
    sys.exit(main())
