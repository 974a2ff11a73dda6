"""The parser of a command: its help is the docstring of the command's module."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path


def command_parser(doc: str) -> argparse.ArgumentParser:
    """A parser with the docstring's first paragraph as description and its indented examples below the arguments.

    Under `linear-moe` the examples say `linear-moe NAME` where the docstring says `python tools/NAME.py`.
    """
    about, *rest = doc.strip().split("\n\n")
    examples = "\n\n".join(part for part in rest if part.startswith("    "))
    called = Path(sys.argv[0]).name
    if called.startswith("linear-moe "):
        examples = re.sub(r"python tools/\w+\.py", called, examples)
    return argparse.ArgumentParser(
        description=about,
        epilog=f"examples:\n{examples}" if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
