"""Python programs in forks of a process that has imported Megatron: a new interpreter needs four seconds for that.

Nothing of ours is imported there and nothing of Megatron is called. Every run is a process of its own, with its own
environment and output.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from multiprocessing import connection, forkserver
from pathlib import Path

from torch.distributed import TCPStore

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
    store, places = meeting_place(ranks) if ranks > 1 else (None, [{}])
    with tempfile.NamedTemporaryFile("r") as output:
        processes = [
            server().Process(target=_become, args=(words, str(folder), environment | place, output.name))
            for place in places
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
            del store
        status = next((process.exitcode for process in processes if process.exitcode), 0)
        return subprocess.CompletedProcess(words, status, output.read())


def meeting_place(ranks: int) -> tuple[TCPStore, list[dict[str, str]]]:
    """The store where ranks find each other, to be kept while they run, and the environment of each.

    This process hosts it, as torchrun does: a port that is only looked up can be another's before rank 0 takes it.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    world["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return store, [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


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


def answers_of_ranks(work, size, arguments, questions, seconds):
    """What ``size`` ranks of gloo send: {question: [the answer of every rank]}.

    Each rank is a process that calls work(rank, environment, pipe, *arguments), and sends an answer to each of
    ``questions``, in their order, within ``seconds`` each. A text is the traceback of a rank that failed.
    """
    store, places = meeting_place(size)
    context = server()
    pipes = [context.Pipe(duplex=False) for _ in range(size)]
    processes = [
        context.Process(target=work, args=(rank, places[rank], pipes[rank][1], *arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = {}
    try:
        for question in questions:
            assert all(receiver.poll(seconds) for receiver, _ in pipes), f"no result for {question}"
            results[question] = [receiver.recv() for receiver, _ in pipes]
            assert not any(isinstance(result, str) for result in results[question]), results[question]
    finally:
        for process in processes:
            process.kill()
        del store
    return results
