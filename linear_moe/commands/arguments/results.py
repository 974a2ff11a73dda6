"""Trains and measures what RESULTS.md reports, and writes its tables and pictures from the measured rows.

    python tools/results.py [--time-limit SECONDS]     trains what is missing, then writes the document
    python tools/results.py --document-only            writes the document from the rows in tools/measured
    python tools/results.py --add DIR                  adds a run of another machine, then writes the document
    python tools/results.py --quick --output DIR       runs the same code with tiny models, and writes into DIR alone

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
    parser.add_argument(
        "--output", type=a_path, default=ROOT / "runs/results", metavar="DIR", help="folder of the runs [runs/results]"
    )
    parser.add_argument("--measured", type=a_path, metavar="DIR", help="folder of the rows [tools/measured]")
    parser.add_argument("--document", type=a_path, metavar="FILE", help="the document to write [RESULTS.md]")
    parser.add_argument("--document-only", action="store_true", help="write the document, train nothing")
    parser.add_argument(
        "--add", type=a_path, nargs="+", default=[], metavar="DIR",
        help="add what tools/language_models.py wrote elsewhere to the measured rows, and train nothing",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="tiny models; rows and document go into --output")
    parser.add_argument(
        "--time-limit",
        type=positive,
        default=float("inf"),
        metavar="SECONDS",
        help="stop after this time; the same command goes on from there",
    )
    args = parser.parse_args(argv)
    place = args.output if args.quick else ROOT
    args.measured = args.measured or (args.output / "measured" if args.quick else ROOT / "tools/measured")
    args.document = args.document or place / "RESULTS.md"
    args.pictures = args.document.parent / ("pictures" if args.quick else "docs/pictures")
    return args
