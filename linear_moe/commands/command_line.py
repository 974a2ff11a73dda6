"""The parser of a command: its help is the docstring of the command's module."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


def command_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the docstring's first paragraph above the arguments, and its examples and the rest below.

    Under `linear-moe` the examples say `linear-moe NAME` where the docstring says `python tools/NAME.py`.
    """
    about, *rest = doc.strip().split("\n\n")
    examples = [part for part in rest if part.startswith("    ")]
    others = [part for part in rest if not part.startswith("    ")]
    below = "\n\n".join([*(["examples:", *examples] if examples else []), *others])
    called = Path(sys.argv[0]).name
    if called.startswith("linear-moe "):
        below = re.sub(r"python tools/\w+\.py", called, below)
    return argparse.ArgumentParser(
        description=about,
        epilog=below.replace("examples:\n\n", "examples:\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
