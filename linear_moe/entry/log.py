"""What a run shows on the screen, and the log file with everything else that Python code prints.

`QuietStreams` stands in for the standard streams of a process of `linear_moe.pretrain`: lines of `ON_SCREEN`, our notes
and errors reach the screen; the rest is kept for the log file, and shown where the run fails. What PyTorch's and NCCL's
own libraries print is not caught, so that their errors are on the screen at any time.
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import warnings
from collections import deque
from pathlib import Path

from linear_moe.entry.machine import accelerated_parts
from megatron_patches.patch import applied

logger = logging.getLogger(__name__)
OUR_PACKAGES = ("linear_moe", "megatron_patches")
ON_SCREEN = re.compile(
    r"error: |step +\d+/|(validation|test)\b.* at step \d+: |.*successfully (saved|loaded) checkpoint|\[exiting program"
)
"""Lines that a reader of the screen needs: of our reporter, of Megatron, and errors of a process that ends at once."""
SHOWN_AFTER_FAILURE = 200
EXPECTED = re.compile(
    r"-+ (end of )?arguments -+|  \w+ \.* ?.*|patch \S+ applied: .*|.*: (User|Future|Deprecation)Warning: .*"
    r"|  warnings\.warn\(.*|.*No CUDA runtime is found.*|WARNING: one_logger package is required.*"
)
"""What every run prints: the table of Megatron's arguments, our patches, warnings about packages that are missing."""
HELP = {"-h", "--help", "--help-mom"}


def is_verbose() -> bool:
    """Whether everything is to be on the screen: `--verbose` of `linear_moe.pretrain`, or MOM_VERBOSE=1."""
    return os.environ.get("MOM_VERBOSE", "0") not in ("", "0")


class Log:
    """The lines that are not on the screen: in memory until `open` names a file, then in the file too."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._file: io.TextIOBase | None = None
        self._waiting: list[str] = []
        self._recent: deque[str] = deque(maxlen=10 * SHOWN_AFTER_FAILURE)

    def open(self, path: Path) -> None:
        """Appends to a file from here on, beginning with the lines so far. A file that cannot be written is left out:
        the log's lines are then in memory alone.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a", buffering=1, encoding="utf-8", errors="replace")
            self._file.writelines(f"{line}\n" for line in self._waiting)
        except OSError as error:
            logger.warning("the log cannot be written to %s: %s", path, error.strerror)
            return
        self.path, self._waiting = path, []

    def add(self, line: str) -> None:
        self._recent.append(line)
        if self._file is None:
            self._waiting.append(line)
            return
        try:
            self._file.write(f"{line}\n")
        except OSError:  # a full disk: training goes on, and the checkpoint's writer reports it
            self._file, self._waiting = None, []

    def last_lines(self) -> list[str]:
        """The last lines before a failure, without the lines that every run prints."""
        return [line for line in self._recent if not EXPECTED.fullmatch(line)][-SHOWN_AFTER_FAILURE:]


class QuietStream(io.TextIOBase):
    """A standard stream whose lines go to the log, and those of `ON_SCREEN` to the screen."""

    def __init__(self, screen: io.TextIOBase, log: Log) -> None:
        self._screen, self._log, self._partial = screen, log, ""
        self._lock = threading.RLock()

    encoding = "utf-8"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._screen.fileno()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._partial = (self._partial + text).split("\n")
            for line in lines:
                self._log.add(line)
                if ON_SCREEN.match(line):
                    print(line, file=self._screen, flush=True)
        return len(text)

    def flush(self) -> None:
        self._screen.flush()


class QuietStreams:
    """The quiet standard streams of a process, from its making to `end`."""

    def __init__(self) -> None:
        self.log = Log()
        self._screens = sys.stdout, sys.stderr
        helps = bool(HELP & set(sys.argv))
        self.is_quiet = not (is_verbose() or helps)
        if helps:  # no warning of a missing package stands above the help
            warnings.simplefilter("ignore")
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        if self.is_quiet:
            sys.stdout, sys.stderr = (QuietStream(screen, self.log) for screen in self._screens)
            # PyTorch made its handler when it was imported, with the stream of that time.
            for handler in logging.getLogger("torch").handlers:
                if getattr(handler, "stream", None) is self._screens[1]:
                    handler.setStream(sys.stderr)
            threading.excepthook = self._thread_failed

    def show(self, line: str) -> None:
        """Prints a line on the screen and in the log."""
        print(line, file=self._screens[0], flush=True)
        if self.is_quiet:
            self.log.add(line)

    def end(self, failed: bool = False) -> None:
        """Brings the screen back. After a failure the first process of a machine shows the last lines of the log."""
        if not self.is_quiet:
            return
        self.is_quiet = False
        sys.stdout, sys.stderr = self._screens
        lines = self.log.last_lines()
        if failed and lines and os.environ.get("LOCAL_RANK", "0") == "0":
            where = f"the whole log is {self.log.path}" if self.log.path else "--verbose shows everything"
            print("\n".join([f"what the run printed before the error ({where}):", *lines]), file=sys.stderr, flush=True)

    def _thread_failed(self, args) -> None:
        """As threading.excepthook, but on the screen."""
        stream, sys.stderr = sys.stderr, self._screens[1]
        try:
            threading.__excepthook__(args)
        finally:
            sys.stderr = stream


class _Notes(logging.Filter):
    """Lets a record pass unless it names a patch that was applied: their number is enough for the screen."""

    def filter(self, record: logging.LogRecord) -> bool:
        return is_verbose() or record.levelno > logging.INFO or record.name != "megatron_patches.patch"


def show_log(*, streams: QuietStreams | None = None) -> None:
    """Prints the log of our packages once, and not on every rank, whatever logging the script around them sets up.

    Args:
        streams: of our own entry, which sets up Megatron's log too: errors on the screen, the rest in the log. Another
            script sets up Megatron's log by itself.
    """
    screen = logging.StreamHandler(streams._screens[1] if streams else None)
    screen.setFormatter(logging.Formatter("%(message)s"))
    screen.addFilter(_Notes())
    handlers = [screen]
    if streams and streams.is_quiet:
        kept = logging.StreamHandler()  # the quiet stream
        kept.setFormatter(logging.Formatter("%(message)s"))
        errors = logging.StreamHandler(streams._screens[1])
        errors.setFormatter(logging.Formatter("%(message)s"))
        errors.setLevel(logging.ERROR)
        logging.basicConfig(handlers=[kept, errors], force=True)  # a library may have set up the log already
        handlers.append(kept)
    elif streams:
        logging.basicConfig(format="%(message)s")
    for package in OUR_PACKAGES:
        ours = logging.getLogger(package)
        ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        ours.propagate = False
        ours.handlers = handlers
    if streams:
        # This logger warns at every evaluation.
        logging.getLogger("megatron.core.rerun_state_machine").setLevel(logging.ERROR)


def found_parts() -> str:
    """Which accelerated parts were found and which are missing."""
    parts = accelerated_parts()
    found = ", ".join(f"{name} ({detail})" for name, detail in parts.items() if detail)
    missing = ", ".join(name for name, detail in parts.items() if not detail)
    return f"found: {found or 'nothing'}; not found: {missing or 'nothing'}"


def announce() -> None:
    """Logs in two lines what a script of another project gets from this one."""
    logger.info(found_parts())
    logger.info("Mixture-of-Memories: %d changes to Megatron in effect (MOM_VERBOSE=1 names each)", len(applied()))
