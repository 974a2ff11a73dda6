"""The rows of tried commands: a CSV file that a later call goes on from, and a table in Markdown."""

from __future__ import annotations

import csv
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from linear_moe.trials.runs import MOM, RESUMED, RESUMES, SOFTMAX, SOFTMAX_RESUMED
from linear_moe.trials.verdict import FAILS, REFUSED, TRAINS

COLUMNS = ("set", "run", "processes", "result", "reason", "seconds")
Row = dict[str, str]
LONGEST_REASON = 300


class Rows:
    """The finished runs, in a CSV file. Several threads may add to it."""

    def __init__(self, file: Path):
        self.file, self.lock = file, threading.Lock()
        self.rows: dict[tuple[str, str], Row] = {}
        if file.is_file():
            with file.open(newline="") as lines:
                self.rows = {(row["set"], row["run"]): row for row in csv.DictReader(lines)}
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as lines:
                csv.writer(lines).writerow(COLUMNS)

    def add(self, **row: str) -> None:
        with self.lock:
            self.rows[row["set"], row["run"]] = row
            with self.file.open("a", newline="") as lines:
                csv.DictWriter(lines, COLUMNS).writerow(row)

    def forget(self, results: Iterable[str]) -> None:
        """Makes the runs with these results, and what was resumed from such runs, count as still to be made."""
        results = set(results)
        again = {name for (name, run), row in self.rows.items() if row["result"] in results}
        self.rows = {
            (name, run): row
            for (name, run), row in self.rows.items()
            if row["result"] not in results and not (run in RESUMES and name in again)
        }
        with self.file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows.values())

    def result(self, name: str, run: str) -> str | None:
        """The result of a run; None for a run that is still to be made."""
        row = self.rows.get((name, run))
        return None if row is None else row["result"]

    def reason(self, name: str, run: str) -> str:
        row = self.rows.get((name, run))
        return "" if row is None else row["reason"]


def markdown(rows: Rows, names: Iterable[str]) -> str:
    """A table with a line for each set: softmax, memories, resumption, and the line that says why."""
    names = [name for name in names if rows.result(name, MOM) is not None]
    lines = [summary(rows, names), "", "| set | softmax | mom | resumed | why |", "|---|---|---|---|---|"]
    for name in names:
        softmax, mom, resumed = (rows.result(name, run) or "" for run in (SOFTMAX, MOM, RESUMED))
        resumed = {TRAINS: "exact", FAILS: "differs"}.get(resumed, resumed)
        if rows.result(name, SOFTMAX_RESUMED) == FAILS:
            resumed += ", as with softmax"
        whys = [
            f"{run}: {reason}" if run != MOM else reason
            for run in (MOM, RESUMED, SOFTMAX)
            if rows.result(name, run) in (REFUSED, FAILS) and (reason := _cell(rows.reason(name, run)))
        ]
        lines.append(f"| {name} | {softmax} | {mom} | {resumed} | {'; '.join(whys)} |")
    return "\n".join(lines) + "\n"


def summary(rows: Rows, names: Iterable[str]) -> str:
    """One line: how many sets have which results."""
    names = list(names)
    parts = []
    for run in (SOFTMAX, MOM, RESUMED):
        counts = Counter(filter(None, (rows.result(name, run) for name in names)))
        parts.append(f"{run}: " + ", ".join(f"{counts[result]} {result}" for result in (TRAINS, REFUSED, FAILS)))
    behind = sum(rows.result(n, SOFTMAX) == TRAINS and rows.result(n, MOM) != TRAINS for n in names)
    return f"{len(names)} sets. " + "; ".join(parts) + f"; {behind} train with softmax and not with memories."


def _cell(text: str) -> str:
    return " ".join(text[:LONGEST_REASON].replace("|", "\\|").split())
