"""What the files in tools/ do, a module a command, each with a ``main`` that returns the exit status."""

from __future__ import annotations

import signal
import sys
from importlib import import_module


def run(name: str) -> int:
    """Runs a command with the words of the command line. Returns the exit status.

    SIGTERM ends the command by ``SystemExit``, so that a half-written file is removed on the way out.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return import_module(f"{__name__}.{name}").main()
