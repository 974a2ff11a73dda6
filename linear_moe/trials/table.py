"""The rows of tried commands: a CSV file that a later call goes on from, and a table in Markdown."""

from __future__ import annotations

import csv
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from linear_moe.trials.runs import MOM, RESUMED, RESUMES, SOFTMAX, SOFTMAX_RESUMED
from linear_moe.trials.verdict import FAILS, REFUSED, STOPS, TRAINS

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

    def share(self, names: Iterable[str], *again: str) -> None:
        """Gives the rows of any of these sets to the others: their commands are the same. The runs of `again` are those
        of the first set.
        """
        names = list(names)
        for run in (MOM, SOFTMAX, RESUMED, SOFTMAX_RESUMED):
            found = next((name for name in names if self.result(name, run) is not None), None)
            for name in names if found else ():
                if name != found and (self.result(name, run) is None or run in again):
                    self.add(**self.rows[found, run] | {"set": name})

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
    lines += [
        f"| {name} | {' | '.join(_results(rows, name))} | {_whys(rows, name, (MOM, RESUMED, SOFTMAX))} |"
        for name in names
    ]
    return "\n".join(lines) + "\n"


def exceptions(rows: Rows, names: Iterable[str]) -> str:
    """A table of the sets that were run and do not train, or do not resume exactly, with a line for each reason."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        if rows.result(name, MOM) in (REFUSED, FAILS, STOPS) or rows.result(name, RESUMED) == FAILS:
            key = (*_results(rows, name), _whys(rows, name, (MOM, RESUMED)))
            alike.setdefault(key, []).append(name)
    lines = ["| sets | softmax | mom | resumed | why |", "|---|---|---|---|---|"]
    for (*results, why), sets in sorted(alike.items(), key=lambda item: -len(item[1])):
        more = f" and {len(sets) - 1} more" if len(sets) > 1 else ""
        lines.append(f"| {sets[0]}{more} | {' | '.join(results)} | {why} |")
    return "\n".join(lines) + "\n"


def _results(rows: Rows, name: str) -> tuple[str, str, str]:
    """What softmax, memories and the resumption came to; "" for a run that was not made."""
    softmax, mom, resumed = (rows.result(name, run) or "" for run in (SOFTMAX, MOM, RESUMED))
    resumed = {TRAINS: "exact", FAILS: "differs"}.get(resumed, resumed)
    with_softmax = {FAILS: ", as with softmax", TRAINS: ", with softmax exact"}
    return softmax, mom, resumed + with_softmax.get(rows.result(name, SOFTMAX_RESUMED) or "", "")


def _whys(rows: Rows, name: str, of: Iterable[str]) -> str:
    """The lines that say why runs do not train."""
    return "; ".join(
        f"{run}: {reason}" if run != MOM else reason
        for run in of
        if rows.result(name, run) in (REFUSED, FAILS, STOPS) and (reason := _cell(rows.reason(name, run)))
    )


def groups(rows: Rows, names: Iterable[str]) -> str:
    """A table with a line for each place that sets come from: how many trained, and how many are still to be run."""
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault("/".join(name.split("/")[: 1 + name.startswith("tests/")]), []).append(name)
    lines = [
        "| sets of | all | run | train | resumed exactly | stop as told | refused | fail | train with softmax only |",
        "|---" * 9 + "|",
    ]
    for place, sets in [*places.items(), ("all", sum(places.values(), []))]:
        counts = Counter(rows.result(name, MOM) for name in sets)
        exact = sum(rows.result(name, RESUMED) == TRAINS for name in sets)
        behind = sum(is_behind(rows, name) for name in sets)
        cells = (len(sets), len(sets) - counts[None], counts[TRAINS], exact, counts[STOPS], counts[REFUSED])
        lines.append(f"| {place} | {' | '.join(map(str, cells))} | {counts[FAILS]} | {behind} |")
    return "\n".join(lines) + "\n"


def is_behind(rows: Rows, name: str) -> bool:
    """Whether a set trains with softmax, and was run and does not train with memories."""
    return rows.result(name, SOFTMAX) == TRAINS and rows.result(name, MOM) not in (TRAINS, None)


def summary(rows: Rows, names: Iterable[str]) -> str:
    """One line: how many sets have which results."""
    names = list(names)
    parts = []
    for run in (SOFTMAX, MOM, RESUMED):
        counts = Counter(filter(None, (rows.result(name, run) for name in names)))
        shown = (TRAINS, REFUSED, FAILS, *((STOPS,) if counts[STOPS] else ()))
        parts.append(f"{run}: " + ", ".join(f"{counts[result]} {result}" for result in shown))
    behind = sum(is_behind(rows, name) for name in names)
    return f"{len(names)} sets. " + "; ".join(parts) + f"; {behind} train with softmax and not with memories."


def _cell(text: str) -> str:
    return " ".join(text[:LONGEST_REASON].replace("|", "\\|").split())
