"""Values of a command line, as types for argparse. A wrong value ends the command with what is expected."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Names of the types that weights are stored and computed in, as in `linear_moe.conversion.config.DTYPES`."""
PICTURES = ("png", "pdf", "svg", "jpg")


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


def between(least: float, most: float) -> Callable[[str], float]:
    """Numbers from `least` to `most`."""
    return number(float, lambda value: least <= value <= most, f"a number from {least:g} to {most:g}")


def size(text: str) -> int:
    """Bytes, from 1: a number alone, or with a unit, as 500MB or 1.5GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?", text, re.IGNORECASE)
    if match:
        unit = (1024 if match[3] else 1000) ** (" KMGT".index((match[2] or " ").upper()))
        count = float(match[1]) * unit
        if count.is_integer() and 1 <= count < 2**63:
            return int(count)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 5GB or 500MB")


def path(text: str) -> Path:
    """A path. Without the check an empty text, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a path")
    return Path(text)


def picture(text: str) -> Path:
    """The path of a picture; a name without a suffix gets .png."""
    target = path(text)
    target = target if target.suffix else target.with_name(target.name + ".png") if target.name else target
    try:
        folder = Path(text).is_dir() or target.is_dir()
    except OSError as error:  # a name that no file can have
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from error
    if folder:
        raise argparse.ArgumentTypeError(f"{text!r} is a folder: expected the name of a picture, such as loss.png")
    if target.suffix[1:].lower() not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a name that ends in .{', .'.join(PICTURES)}")
    return target


def device(text: str):
    """A device of PyTorch that this machine has."""
    import torch

    try:
        found = torch.device(text)
        usable = found.type != "meta" and torch.empty(0, device=found).device.type == found.type
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, ValueError):
        usable = False
    if not usable:
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise argparse.ArgumentTypeError(f"{text!r}: expected a device of this machine, {' or '.join(here)}")
    return found


def default_device() -> str:
    """A GPU where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


seed = whole(0, 2**32 - 1)
not_negative = number(float, lambda value: 0 <= value < float("inf"), "a number that is not negative")


def text(value: str) -> str:
    """A text that is not empty. An empty text, as of a variable that is not set, says nothing."""
    if not value.strip():
        raise argparse.ArgumentTypeError(f"{value!r}: expected a text")
    return value


positive = number(float, lambda value: 0 < value < float("inf"), "a number above 0")
share = number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
fraction = number(float, lambda value: 0 <= value < 1, "a number from 0 up to, but not including, 1")
