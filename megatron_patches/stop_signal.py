"""A second SIGTERM ends a run that --exit-signal-handler has told to save and end."""

import os
import signal
import sys
import time

from megatron_patches.patch import Patch, wrap

FORWARDED_WITHIN = 5.0
"""Seconds after the first signal in which a signal is that same one, forwarded by a launcher: torchrun sends its ranks
the SIGTERM that every process of the group has received already."""


def _abort_at_second_signal(enter, handler):
    """DistributedSignalHandler.__enter__: its own handler only notes that there was a signal."""
    entered = enter(handler)
    first = None

    def stop(number, frame) -> None:
        nonlocal first
        handler._signal_received = True
        now = time.monotonic()
        first = now if first is None else first
        if now - first <= FORWARDED_WITHIN:
            return
        print(
            f"a second {signal.Signals(number).name}: aborted, the last step is not saved", file=sys.stderr, flush=True
        )
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    signal.signal(handler.sig, stop)
    return entered


PATCH = Patch(
    name="stop-signal",
    reason="the second signal to a run that saves and ends is ignored like the first",
    removed_when="DistributedSignalHandler lets a second signal end the process",
    targets=(
        wrap("megatron.training.dist_signal_handler", "DistributedSignalHandler.__enter__", _abort_at_second_signal),
    ),
)
