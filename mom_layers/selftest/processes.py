"""Runs checks in processes of their own: side by side, since compiling takes most of the time, and so that a kernel or
a compiler that ends its process, or leaves the device in an error, costs one check alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable

from mom_layers.selftest.cases import Line
from mom_layers.selftest.plan import Plan

LIMIT = 240  # seconds for one check, of which compiling takes most
TAIL = 4000  # characters of a dead process's output that the log keeps


class Worker:
    """One process, which starts at the first check and again after its end.

    Args:
        plan: of the self-test.
        limit: seconds for one check.

    Attributes:
        unknown: whether the last answer is not complete for a reason that says nothing about the kernel.
    """

    def __init__(self, plan: Plan, limit: float = LIMIT):
        self.plan, self.limit = plan, limit
        self.process: subprocess.Popen | None = None
        self.noise, self.unknown = tempfile.TemporaryFile(), False

    def _start(self) -> subprocess.Popen:
        self.noise.truncate(0)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
        return subprocess.Popen(
            [sys.executable, "-m", "mom_layers.selftest.worker", self.plan.to_json()],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.noise, text=True, env=environment,
        )  # fmt: skip

    def ask(self, question: dict) -> tuple[list[dict], str | None]:
        """Every message of the answer, and in words why the answer is not complete; None where it is."""
        self.unknown = False
        try:
            self.process = self.process or self._start()
        except OSError as error:
            self.unknown = True
            return [], f"its process could not start: {error}"
        process, late, messages = self.process, threading.Event(), []

        def stop():
            late.set()
            process.kill()

        clock = threading.Timer(self.limit, stop)
        clock.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            for words in process.stdout:
                message = json.loads(words)
                if message.get("done"):
                    if message["restart"]:
                        self.close()
                    return messages, None
                messages.append(message)
        except OSError:
            pass  # the process is gone; how, is said below
        finally:
            clock.cancel()
        status = process.wait()
        self.close()
        if late.is_set():
            self.unknown = True
            return messages, f"no answer within {self.limit:.0f} seconds"
        if status < 0:
            return messages, f"its process was ended by {signal.Signals(-status).name}"
        return messages, f"its process ended with status {status}"

    def output(self) -> str:
        """The end of what the process printed beside its answers."""
        self.noise.seek(0)
        return self.noise.read().decode(errors="replace")[-TAIL:].strip()

    def close(self) -> None:
        """Ends the process."""
        if self.process is not None:
            process, self.process = self.process, None
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.kill()
            process.wait()
            process.stdout.close()


def _last_words(output: str) -> str:
    lines = [line for line in output.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _lines(worker: Worker, check: str, what: str) -> list[Line]:
    messages, trouble = worker.ask({"check": check, "what": what})
    lines = [Line(**message["line"]) for message in messages]
    if trouble:
        output = worker.output()
        reason = f"{trouble}: {_last_words(output)}".rstrip(": ")
        lines.append(Line(check, "", right=False, failure=reason, unknown=worker.unknown, details=output))
    return lines


def check_all(plan: Plan, workers: int, done: Callable[[int, int], None] | None = None) -> dict[str, list[Line]]:
    """Runs all checks of a plan without times.

    Args:
        workers: processes side by side.
        done: called after every check with the numbers of checks that have run and of all checks.

    Returns:
        the lines of every check, by its name and in the plan's order.
    """
    names = list(plan.checks())
    waiting, found, lock = queue.SimpleQueue(), {}, threading.Lock()
    for name in names:
        waiting.put(name)

    def work():
        worker = Worker(plan)
        try:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    return
                lines = _lines(worker, name, "errors")
                with lock:
                    found[name] = lines
                    if done is not None:
                        done(len(found), len(names))
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(names)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: found[name] for name in names}


class Timer:
    """Times checks one after another in one process, with the card to itself."""

    def __init__(self, plan: Plan):
        self.worker = Worker(plan)

    def speeds(self) -> tuple[float, float] | None:
        """Bytes a second of a copy and operations a second of a product; None where the card could not be timed."""
        messages, _ = self.worker.ask({"what": "speeds"})
        return tuple(messages[0]["speeds"]) if messages else None

    def add_times(self, name: str, lines: list[Line], speeds: tuple[float, float] | None) -> None:
        """Fills ``milliseconds`` and ``floor`` of the lines of a check."""
        from mom_layers.selftest.speed import floor_milliseconds

        timed = {(line.kernel, line.shape): line for line in _lines(self.worker, name, "times")}
        for line in lines:
            time = timed.pop((line.kernel, line.shape), None)
            if time is None:
                continue
            line.milliseconds = time.milliseconds
            if time.floor is not None and speeds is not None:
                line.floor = floor_milliseconds(*time.floor, speeds)
            if time.failure:
                line.right, line.failure, line.details = False, f"timing: {time.failure}", time.details
        lines += [line for line in timed.values() if line.failure]

    def close(self) -> None:
        self.worker.close()
