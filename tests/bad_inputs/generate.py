"""Draws bad inputs with a seed, runs them and prints a table of the faults.

PYTHONPATH=. python tests/bad_inputs/generate.py [--seed 0] [--count N] [--only api]
"""

from __future__ import annotations

import argparse
import sys
import time

from api_cases import api_cases
from judge import Case, draw, table

SOURCES = {"api": api_cases}


def run(cases: list[Case]) -> dict[Case, str]:
    """Fault of every case that has one."""
    return {case: fault for case in cases if (fault := case.run()) is not None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", choices=SOURCES, nargs="+", default=list(SOURCES))
    args = parser.parse_args()
    start, cases = time.monotonic(), draw([c for name in args.only for c in SOURCES[name]()], args.count, args.seed)
    faults = run(cases)
    print(table(faults))
    print(f"{len(cases)} cases, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
