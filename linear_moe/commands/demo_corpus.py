"""Gathers a small training corpus from the sources and texts of the Python installation.

The command line is linear_moe/commands/arguments/demo_corpus.py.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from linear_moe.commands import run_command
from linear_moe.commands.arguments.demo_corpus import LEAST_BYTES, parse_arguments
from linear_moe.temporary import replaced_file

TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")
SHORTEST_TEXT = 200  # characters; shorter are empty __init__.py files and one-line launchers
SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",  # character tables
    "pydoc_data",  # help_topics yields these texts without quotes
}
SKIPPED_FILES = re.compile(r"_sysconfigdata|config-[\d.]+|(^|/)(stringprep|entities|_casefix)\.py$")


class TooLittleText(ValueError):
    """The Python installation has too little text; the message is for the user."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for too little text and for an output that cannot be written."""
    args = parse_arguments(argv)
    return run_command("demo_corpus.py", lambda: gather_corpus(args), TooLittleText)


def gather_corpus(args: argparse.Namespace) -> None:
    """Writes ``args.output`` and prints its size. Raises TooLittleText, or OSError where the file cannot be written."""
    root = Path(sysconfig.get_path("stdlib"))
    lines = select(gather(root), args.max_bytes)
    size = sum(map(len, lines))
    if size < LEAST_BYTES:
        raise TooLittleText(
            f"only {size} bytes of text in {root}, expected at least {LEAST_BYTES}; "
            "give preprocess_data.py texts of your own instead"
        )
    write(lines, args.output)
    print(f"{args.output}: {len(lines)} documents, {size} bytes, from {root}")


def gather(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (path, text) of each document of the standard library at `root`."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            if name.endswith(TEXT_SUFFIXES) and not SKIPPED_FILES.search(relative):
                try:
                    yield relative, path.read_text(encoding="utf-8")
                except (UnicodeDecodeError, OSError):
                    continue  # a source in an old encoding, or a dangling link
    yield from help_topics()


def help_topics() -> Iterator[tuple[str, str]]:
    """The chapters of the language reference that `help("with")` and the like print: prose, not code."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return  # some distributions have a package of their own for these texts
    for name, text in topics.items():
        yield f"pydoc_data/topics/{name}", text


def select(documents: Iterator[tuple[str, str]], max_bytes: int) -> list[bytes]:
    """JSON lines of the documents in the order of a hash of their paths, up to `max_bytes`.

    The order is a fixed shuffle, which mixes code and prose. Equal texts appear once.
    """
    lines, seen, size = [], set(), 0
    for path, text in sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
        if len(text) < SHORTEST_TEXT or text in seen:
            continue
        line = json.dumps({"path": path, "text": text}, ensure_ascii=False).encode() + b"\n"
        if size + len(line) > max_bytes:
            break
        seen.add(text)
        lines.append(line)
        size += len(line)
    return lines


def write(lines: Sequence[bytes], output: Path) -> None:
    """Writes under a temporary name and renames, so that `output` is the new file, or what it was."""
    with replaced_file(output) as partial, open(partial, "wb") as file:
        file.writelines(lines)
