"""Child processes that end with their parent, and that signals to the whole job do not stop.

A scheduler sends SIGTERM to every process of a job. The training process then saves and ends; a process that writes
its checkpoints has to live until that is done, and no longer. This module imports nothing but the standard library:
worker processes start with it.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1  # from <sys/prctl.h>


def end_with_parent(parent: int | None = None) -> None:
    """Makes the kernel kill this process at the moment its parent dies, however that happens. Linux only: elsewhere
    this function does nothing.

    parent: process id of the parent; by default that of the process that started this one through multiprocessing.
    """
    if not sys.platform.startswith("linux"):
        return
    if parent is None:
        starter = multiprocessing.parent_process()
        parent = os.getppid() if starter is None else starter.pid
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def started_without_stop_signals() -> Iterator[None]:
    """A process that is started inside has STOP_SIGNALS blocked from its first instruction. Signals to this process
    are delivered at the end.
    """
    resource_tracker.ensure_running()  # its start, which the first process of multiprocessing brings, unblocks SIGTERM
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
