"""Python programs in forks of a process that has imported Megatron: a new interpreter needs four seconds for that.

Nothing of ours is imported there and nothing of Megatron is called. Every run is a process of its own, with its own
environment and output.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from multiprocessing import connection, forkserver
from pathlib import Path

ENVIRONMENT = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@cache
def server():
    """A context of multiprocessing whose processes are forks of one that has imported warm_imports."""
    before = dict(os.environ)
    os.environ |= ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["warm_imports"])
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


def run(*words, folder: Path, environment: dict[str, str], timeout: float, ranks=1) -> subprocess.CompletedProcess:
    """Runs a module (`-m name`) or a script with its arguments to its end, in `folder`. stdout and stderr come back as
    one text, that of several ranks too; these get the places in the world that torchrun gives them."""
    words = list(map(str, words))
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [
            server().Process(target=_become, args=(words, str(folder), environment | place, output.name))
            for place in _places(ranks)
        ]
        for process in processes:
            process.start()
        try:
            end, running = time.monotonic() + timeout, set(processes)
            while running and not any(process.exitcode for process in processes):  # the others would wait for this one
                if not connection.wait([process.sentinel for process in running], end - time.monotonic()):
                    raise subprocess.TimeoutExpired(words, timeout, output.read())
                running = {process for process in running if process.is_alive()}
        finally:
            for process in processes:
                process.kill()
        status = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(words, status, output.read())


def _places(ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _become(words: list[str], folder: str, environment: dict[str, str], output: str) -> None:
    """Does in a fork what the interpreter does with these words."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    log = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # The process that collects what was written would be a new interpreter, which imports torch and Megatron.
    filesystem_async.get_write_results_queue = partial(filesystem_async.get_write_results_queue, "fork")
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
