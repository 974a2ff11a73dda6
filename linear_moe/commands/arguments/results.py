"""Trains and measures what RESULTS.md reports, and writes its tables and pictures from the measured rows.

    python tools/results.py [--time-limit SECONDS]     what is missing, then the document
    python tools/results.py --document-only            the document, from the rows in tools/measured
    python tools/results.py --add DIR                  the same, with the rows of a run on another machine
    python tools/results.py --quick --output DIR       the same code with tiny models, on a CPU, into DIR alone

Finished models are rows in tools/measured and are not trained again; a run that was stopped goes on with the rest.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import path as a_path
from linear_moe.commands.values import positive

ROOT = Path(__file__).parents[3]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=a_path, default=ROOT / "runs/results", metavar="DIR", help="[runs/results]")
    parser.add_argument("--measured", type=a_path, metavar="DIR", help="folder of the rows [tools/measured]")
    parser.add_argument("--document", type=a_path, metavar="FILE", help="[RESULTS.md]")
    parser.add_argument("--document-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--add", type=a_path, nargs="+", default=[], metavar="DIR",
        help="add what tools/language_models.py wrote elsewhere to the measured rows, and train nothing",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny models; rows and document go into --output")
    parser.add_argument(
        "--time-limit", type=positive, default=float("inf"), metavar="SECONDS", help="then stop cleanly"
    )
    args = parser.parse_args(argv)
    place = args.output if args.quick else ROOT
    args.measured = args.measured or (args.output / "measured" if args.quick else ROOT / "tools/measured")
    args.document = args.document or place / "RESULTS.md"
    args.pictures = args.document.parent / ("pictures" if args.quick else "docs/pictures")
    return args
