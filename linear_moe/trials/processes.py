"""The processes of a run, as torchrun would start them, but forked from one that has imported Megatron: most of a short
run's time would be that import.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing import connection, forkserver
from pathlib import Path

import torch.multiprocessing
from torch.distributed import TCPStore

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore",
}
LIVE: set = set()
"""Processes that have not ended, of all runs."""
ONE_AT_A_TIME = threading.Lock()
"""Held by the thread that starts a process or reads an exit status: starting a process reads those of all others, and
of two threads that read one status, one finds none and reports 255.
"""
GRACE = 3.0
"""Seconds that the other processes of a run have to say why, after the first has failed."""


@cache
def server(clone: Path):
    """A context of multiprocessing whose processes are forks of one that has imported the Megatron of a clone."""
    before = dict(os.environ)
    os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(clone), str(ROOT), *filter(None, sys.path)])}
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["linear_moe.trials.preload"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run(words: Sequence[str], number: int, clone: Path, folder: Path, log: Path, seconds: float) -> int | None:
    """Runs a Python module, words[0], with its arguments in `number` processes of one world.

    Returns the first exit status that is not 0, else 0; None for a run that was stopped at its limit. The output of
    rank i goes to `log` with the rank as its suffix, and in the end all of it to `log`.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if "--use-torch-fsdp2" in words:  # Megatron refuses one connection there, and asks for one elsewhere
        world["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"
    outputs = [log.with_suffix(f".{rank}") for rank in range(number)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            place = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = server(clone).Process(target=_become, args=(list(words), str(folder), place, str(output)))
            with ONE_AT_A_TIME:
                process.start()
            processes.append(process)
            LIVE.add(process)
        return _wait(processes, seconds)
    finally:
        for process in processes:
            _end(process)
        del store
        with log.open("w") as whole:
            whole.write(f"# {number} processes: python -m {' '.join(words)}\n")
            for output in filter(Path.is_file, outputs):
                whole.write(output.read_text(errors="replace") + "\n")
                output.unlink()


def _wait(processes: list, seconds: float) -> int | None:
    end, failed = time.monotonic() + seconds, None
    while True:
        with ONE_AT_A_TIME:
            statuses = [process.exitcode for process in processes]
        running = [process for process, status in zip(processes, statuses, strict=True) if status is None]
        if failed is None and (failed := next(filter(None, statuses), None)) is not None:
            end = min(end, time.monotonic() + GRACE)
        if not running:
            return failed or 0
        left = end - time.monotonic()
        if left <= 0:
            return failed
        connection.wait([process.sentinel for process in running], min(left, 1.0))


def _end(process) -> None:
    """Ends a process and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        with ONE_AT_A_TIME:
            process.kill()
    connection.wait([process.sentinel])
    with ONE_AT_A_TIME:
        process.join()
    LIVE.discard(process)


def end_all() -> None:
    """Ends the processes of all runs: those who wait for them return."""
    for process in list(LIVE):
        with ONE_AT_A_TIME:
            process.kill()


def _become(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Does in a fork what the interpreter does with ``-m`` and these words."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    os.setsid()
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ |= environment
    os.chdir(folder)
    sys.stdout.reconfigure(line_buffering=True)
    # Processes that write checkpoints would be new interpreters, which import torch and Megatron.
    results_queue = filesystem_async.get_write_results_queue
    filesystem_async.get_write_results_queue = lambda *mode, **named: results_queue("fork")
    get_context = multiprocessing.get_context
    for module in (multiprocessing, torch.multiprocessing):
        module.get_context = lambda method=None: get_context("fork" if method == "forkserver" else method)
    sys.argv = list(words)
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
