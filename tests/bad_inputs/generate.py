"""Draws bad inputs with a seed, runs them and prints a table of the faults.

PYTHONPATH=.:tests python tests/bad_inputs/generate.py [--seed 0] [--count N] [--only api]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from api_cases import api_cases
from command_cases import command_cases
from judge import Case, draw, table
from script_cases import script_cases
from training_cases import setting_cases, training_cases

SOURCES = {"api": api_cases, "commands": command_cases, "script": script_cases, "settings": setting_cases,
           "training": training_cases}  # fmt: skip
"""Of every kind of call, the function that makes its cases, for which it may write into a folder."""


def run(cases: list[Case]) -> dict[Case, str]:
    """The cases that end in a fault, each with its fault."""
    faults = {}
    for case in cases:
        if (fault := case.run()) is not None:
            faults[case] = fault
            print(f"fault: {case}: {' '.join(fault.split())[:200]}", flush=True)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--target", help="cases of one call or command")
    parser.add_argument("--only", choices=SOURCES, nargs="+", default=list(SOURCES))
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        every = [case for name in args.only for case in SOURCES[name](Path(folder, name))]
        cases = draw([case for case in every if args.target in (None, case.target)], args.count, args.seed)
        faults = run(cases)
    print(table(faults))
    print(f"{len(cases)} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
