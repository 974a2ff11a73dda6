"""What the files in tools/ do, a module a command, each with a ``main`` that returns the exit status."""

from __future__ import annotations

import signal
import sys
from importlib import import_module


def run(name: str) -> int:
    """Runs a command with the words of the command line. Returns the exit status.

    SIGTERM, and SIGHUP unless nohup has it ignored, end the command by ``SystemExit``, so that a half-written file is
    removed on the way out.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    return import_module(f"{__name__}.{name}").main()
