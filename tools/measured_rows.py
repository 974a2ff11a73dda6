"""Rows of the CSV files in tools/measured, for the pictures and tables of the documentation."""

from __future__ import annotations

import csv
from pathlib import Path

MEASURED = Path(__file__).parent / "measured"

Row = dict[str, str]


def read_rows(name: str) -> list[Row]:
    """All rows of a file, in its order: newer rows come later."""
    with (MEASURED / name).open(newline="") as file:
        return list(csv.DictReader(file))


def rows_of_last_commit(name: str, column: str, kinds: set[str]) -> list[Row]:
    """The rows of a file that share the newest commit which has all of ``kinds`` in ``column``.

    Raises ValueError where no commit has them all.
    """
    rows = read_rows(name)
    for commit in reversed(list(dict.fromkeys(row["commit"] for row in rows))):
        chosen = [row for row in rows if row["commit"] == commit]
        if kinds <= {row[column] for row in chosen}:
            return chosen
    raise ValueError(f"{name} has no commit with rows of all of {', '.join(sorted(kinds))}")


def source(rows: list[Row]) -> str:
    """Devices and commits of rows, for a caption."""
    devices, commits = (list(dict.fromkeys(row[key] for row in rows)) for key in ("device", "commit"))
    return f"{' and '.join(devices)}, commit{'s' * (len(commits) > 1)} {' and '.join(commits)}"
