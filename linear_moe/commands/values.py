"""Numbers of a command line, as types for argparse. A wrong value ends the command with what is expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def number(kind: Callable[[str], float], accepts: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """A type for argparse: `kind` of the text, where `accepts` is true of it."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
        return value

    return parse


def whole(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    """Whole numbers from `least` to `most`."""
    at_least = number(int, lambda value: value >= least, f"a whole number of at least {least}")

    def parse(text: str) -> int:
        value = at_least(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at most {most}")
        return value

    return parse


def path(text: str) -> Path:
    """A path. Without the check an empty text, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a path")
    return Path(text)


positive = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
share = number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
fraction = number(float, lambda value: 0 <= value < 1, "a number from 0 up to, but not including, 1")
