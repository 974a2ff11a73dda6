"""Cases of bad input and what is right for them, for the API and for the commands alike.

A case changes one argument of a call that works. Right is an error that names the argument or quotes the value, or a
result where the changed value is one that the call documents. All else is a fault: another kind of exception, an error
that names nothing, a crash, a result for a value that cannot work, something half-written.
"""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """One bad value of one argument.

    Attributes:
        target: the call or command.
        argument: its argument.
        kind: "empty", "wrong type", "negative", "zero", "huge", "missing path", "unreadable path", "NaN", ...
        run: runs the case and returns a fault in words, or None.
    """

    target: str
    argument: str
    kind: str
    run: Callable[[], str | None]

    def __str__(self) -> str:
        return f"{self.target} {self.argument} {self.kind}"


def run_apart(case: Case) -> str | None:
    """The fault of a case, which runs in a working folder of its own.

    A value that a program takes for the name of a file makes that file there; no bad value may leave one.
    """
    before = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="bad-input-") as folder:
        os.chdir(folder)
        try:
            fault = case.run()
        finally:
            os.chdir(before)
        left = files(Path(folder))
    return fault or (f"left in the working folder: {list(left)[:4]}" if left else None)


def files(folder: Path) -> dict[str, int]:
    """Path and size of everything under a folder."""
    return {str(path.relative_to(folder)): path.lstat().st_size for path in sorted(folder.rglob("*"))}


@contextmanager
def untouched(folder: Path = ROOT) -> Iterator[list[str]]:
    """Yields a list to which the end of the block adds the files that appeared meanwhile in a folder of sources."""
    before, appeared = _sources(folder), []
    yield appeared
    appeared += sorted(_sources(folder) - before)


def _sources(folder: Path) -> set[str]:
    found = set()
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__pycache__"]
        found |= {os.path.relpath(os.path.join(parent, name), folder) for name in folders + names}
    return found


def draw(cases: Iterable[Case], count: int | None, seed: int) -> list[Case]:
    """``count`` of the cases in an order that the seed fixes, from every target in turn; all of them without one."""
    chance = random.Random(seed)
    by_target: dict[str, list[Case]] = {}
    for case in cases:
        by_target.setdefault(case.target, []).append(case)
    for group in by_target.values():
        chance.shuffle(group)
    mixed = []
    while any(by_target.values()):
        mixed += [group.pop() for group in by_target.values() if group]
    return mixed if count is None else mixed[:count]


def names(text: str, *words: object) -> bool:
    """Whether one of the words stands in the text, not as a part of another word."""
    return any(re.search(rf"(?<![\w-]){re.escape(str(word))}(?![\w])", text) for word in words if str(word))


def table(faults: dict[Case, str]) -> str:
    rows = [(case.target, case.argument, case.kind, " ".join(fault.split())[:300]) for case, fault in faults.items()]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:3]] if rows else []
    return "\n".join("  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows)
