"""Trains and measures what RESULTS.md reports, and writes its tables and pictures from the measured rows.

The command line is linear_moe/commands/arguments/results.py.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from linear_moe.commands import run_command
from linear_moe.commands.arguments.results import ROOT, parse_arguments
from linear_moe.evidence import tables
from linear_moe.evidence.results import LANGUAGE_MODELS, RECALL, Results, fill, merge_rows
from linear_moe.recall import records
from linear_moe.temporary import replaced_file

RECALL_SETTINGS = ["--steps", "20000", "--max-steps", "20000", "--rates", "2e-3", "4e-3", "8e-3"]
RECALL_RUNS = (
    ["--mom", "4/2+shared", "--heads", "1"],
    ["--mom", "8/2+shared", "4/2", "4/1+shared", "--heads", "1", "--baselines", "memory"],
    ["--mom", "4/2+shared", "4/2", "--heads", "2", "--baselines", "memory"],
    ["--mom", "4/2+shared+text", "4/2+text", "--heads", "1", "--baselines", "memory"],
    ["--mom", "4/2+shared+text", "4/2+text", "--heads", "2", "--baselines", "memory"],
)
QUICK_RECALL_RUNS = (["--quick", "--mom", "4/2+shared", "--baselines", "memory", "--steps", "8", "--seeds", "0"],)
MODELS = ["--models", "all", "--equal-time", "mom"]
QUICK_MODELS = ["--quick", "--models", "mom", "softmax"]
ROWS = (tables.MODELS, tables.POSITIONS, tables.REPEATS, tables.HISTORIES)


class StepFailed(Exception):
    """One of the tools ended with an error."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool. Returns 0, or 1 where a tool failed or the document has an unknown part."""
    start = time.monotonic()
    args = parse_arguments(argv)
    return run_command("results.py", lambda: results(args, start + args.time_limit), ValueError, StepFailed)


def results(args: argparse.Namespace, deadline: float) -> None:
    """Trains what is missing until the deadline, and writes the document.

    Raises ValueError where there is no GPU for models of full size, StepFailed after the document was written, where a
    tool failed.
    """
    trains = not (args.document_only or args.add)
    if trains and not args.quick and not torch.cuda.is_available():
        raise ValueError("training what is missing needs a GPU: give --quick, or --document-only")
    for folder in args.add:
        if not (folder / tables.MODELS).is_file():
            raise ValueError(f"--add {folder} has no {tables.MODELS}: give a folder of tools/language_models.py")
        add_models(folder, args.measured / LANGUAGE_MODELS)
    failed = train(args, deadline) if trains else []
    source = args.document if args.document.exists() else ROOT / "RESULTS.md"
    found = Results(args.measured, args.pictures, args.pictures.relative_to(args.document.parent).as_posix())
    text = fill(source.read_text(encoding="utf-8"), found)
    with replaced_file(args.document) as partial:
        partial.write_text(text, encoding="utf-8")
    print(args.document)
    if failed:
        raise StepFailed(f"{', '.join(failed)} ended with an error, see above")


def train(args: argparse.Namespace, deadline: float) -> list[str]:
    """Runs the tools, which go on from the measured rows. Returns the names of the tools that failed."""
    from linear_moe.commands import language_models, recall

    failed = []
    folder = args.output / "recall"
    for name in (RECALL, records.TIMES):
        for path in [*args.measured.glob(f"*{name}"), folder / name]:
            records.upgrade(path)
    merge_rows(sorted(args.measured.glob(f"*{RECALL}")), folder / RECALL)
    merge_rows(sorted(args.measured.glob(f"*{records.TIMES}")), folder / records.TIMES)
    for run in QUICK_RECALL_RUNS if args.quick else RECALL_RUNS:
        words = ["--output", str(folder), *limit(deadline), *run]
        words += [] if args.quick else RECALL_SETTINGS
        if recall.main(words):
            failed.append("recall.py")
        collect(folder, args.measured)
    folder = args.output / LANGUAGE_MODELS
    kept = args.measured / LANGUAGE_MODELS
    for name in ROWS:
        merge_rows([kept / name], folder / name)
    words = ["--output", str(folder), *limit(deadline)]
    if language_models.main([*words, *(QUICK_MODELS if args.quick else MODELS)]):
        failed.append("language_models.py")
    add_models(folder, kept)
    return failed


def add_models(folder: Path, kept: Path) -> None:
    """Adds what tools/language_models.py wrote into a folder to the measured rows."""
    for name in ROWS:
        merge_rows([folder / name], kept / name)
    for path in [*folder.glob("memories_*.json"), *folder.glob("data/corpus.json")]:
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, kept / path.name)


def limit(deadline: float) -> list[str]:
    """The option for the time that is left, at least a second; none without a limit."""
    return [] if deadline == float("inf") else ["--time-limit", str(max(1.0, deadline - time.monotonic()))]


def collect(folder: Path, measured: Path) -> None:
    """Adds new rows of recall to the measured ones."""
    for name in (RECALL, records.TIMES):
        known = [row for path in measured.glob(f"*{name}") for row in records.read(path)]
        records.append(measured / name, [row for row in records.read(folder / name) if row not in known])
