"""Gathers a small training corpus from the sources and texts of the Python installation.

    python tools/demo_corpus.py --output data/corpus.jsonl

Writes one JSON line a document, {"path": ..., "text": ...}: library modules, the few text files beside them, and the
chapters of the language reference that `help()` prints. Leaves out everything that some distributions leave out or
generate (tests, build settings, character tables): two machines with the same Python write almost the same corpus.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import path as a_path

LEAST_BYTES = 1_000_000


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=a_path, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument("--max-bytes", type=int, default=12_000_000, help="largest size of the file [%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    args = parser.parse_args(argv)
    if args.max_bytes < LEAST_BYTES:
        parser.error(f"--max-bytes {args.max_bytes}: expected at least {LEAST_BYTES}")
    if args.output.suffix != ".jsonl":
        parser.error(f"--output {args.output}: expected a name that ends in .jsonl")
    try:
        exists = args.output.exists()
    except OSError as error:  # a name that no file can have
        parser.error(f"--output {args.output}: {error.strerror}")
    if exists and not args.overwrite:
        parser.error(f"{args.output} exists; give another name, or --overwrite to replace it")
    return args
