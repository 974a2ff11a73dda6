"""What `linear-moe` and the files in tools/ do, a module for each command.

Every module has ``main(argv) -> int``, which returns the exit status, and ``parse_arguments(argv)``, which raises
SystemExit(2) for a wrong command line. `run_command` is the one path from an error to the exit status.
"""

from __future__ import annotations

import errno
import logging
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def run(name: str) -> int:
    """Runs a command with the words of the command line. Returns the exit status.

    SIGTERM, and SIGHUP unless nohup has it ignored, end the command by ``SystemExit``, so that a half-written file is
    removed on the way out.
    """
    # Without a GPU this logger warns of a CUDA compiler that has no device to compile for.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    return import_module(f"{__name__}.{name}").main()


def run_command(name: str, work: Callable[[], object], *errors: type[Exception], note: str = "") -> int:
    """Calls ``work()``. Returns 0; 1 after an error, and 130 after an interrupt, with the reason on stderr.

    Args:
        name: of the file in tools/; `linear-moe` gives its own name instead.
        errors: exceptions whose message is for the user, beside OSError, SafetensorError and a lack of memory. Other
            exceptions pass.
        note: a line to print after the reason.
    """
    try:
        work()
    except errors as error:
        return _failed(name, str(error), note)
    except KeyboardInterrupt:
        _failed(name, "interrupted", note)
        return 130
    except Exception as error:
        if _is_out_of_memory(error):
            return _failed(name, f"not enough memory: {' '.join(str(error).split())}", note)
        if not (isinstance(error, OSError) or _is_safetensors(error)):
            raise
        return _failed(name, " ".join(_reason(error).split()), note)
    return 0


def _is_safetensors(error: Exception) -> bool:
    """Whether safetensors raised the error. A command that needs no weights runs without that package."""
    return type(error).__module__.partition(".")[0] == "safetensors"


def _failed(name: str, reason: str, note: str) -> int:
    called = Path(sys.argv[0]).name
    name = called if called.startswith("linear-moe ") else name
    print(f"{name}: error: {reason}" + (f"\n{note}" if note else ""), file=sys.stderr)
    return 1


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python, or PyTorch on a GPU or a CPU, has no memory for what was to be computed."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
        return f"{text}; nothing was written" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else text
    return f"{error}; nothing was written"
