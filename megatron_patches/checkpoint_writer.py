"""Megatron's checkpoint writer outlives a stop signal to the whole job, ends with its run, and tells why it failed.

Its results go through the server process of a multiprocessing.Manager: 540 MB, which dies of a SIGTERM to the job, so
that the checkpoint after that signal cannot be written, and which outlives a run that is killed. Here a thread
of the run serves the results. The process that writes asynchronous checkpoints has the stop signals blocked and is
killed when its run ends.
"""

import multiprocessing
import os
import queue
import sys
import threading
import uuid
from contextlib import suppress
from functools import partial
from multiprocessing import connection, util

import torch

from megatron_patches import child_processes
from megatron_patches.checkpoint_folder import CheckpointError
from megatron_patches.patch import Patch, apply_all, replace, wrap

_WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async"
_ASYNC = "megatron.core.dist_checkpointing.strategies.async_utils"


class ResultsQueue:
    """A queue that the process that makes it reads, and that its child processes put results into.

    A thread of that process takes the results. The queue can be sent to a child process.
    """

    def __init__(self):
        listener = connection.Listener(authkey=multiprocessing.current_process().authkey)
        self.owner, self.address, self.results = os.getpid(), listener.address, queue.SimpleQueue()
        threading.Thread(target=self._take, args=(listener,), name="checkpoint-results", daemon=True).start()

    def __getstate__(self):
        return {"owner": self.owner, "address": self.address}

    def _take(self, listener: connection.Listener) -> None:
        while True:
            with suppress(OSError, EOFError, multiprocessing.AuthenticationError), listener.accept() as child:
                self.results.put(child.recv())
                child.send("taken")

    def put(self, result) -> None:
        """Returns when the result is in the queue."""
        if os.getpid() == self.owner:
            return self.results.put(result)
        with connection.Client(self.address, authkey=multiprocessing.current_process().authkey) as owner:
            owner.send(result)
            owner.recv()

    def get_nowait(self):
        """The oldest result. Raises queue.Empty where there is none."""
        return self.results.get_nowait()


_results: ResultsQueue | None = None


def _results_queue(original, mp_mode: str = "spawn") -> ResultsQueue:
    """The queue of this process."""
    global _results
    if _results is None or _results.owner != os.getpid():
        _results = ResultsQueue()
    return _results


_failures: list[Exception] = []
"""Errors of the threads that write the files of one checkpoint."""


def _write_file(write_preloaded_data, *positional, **keywords):
    output = write_preloaded_data(*positional, **keywords)
    if isinstance(output[1], Exception):
        _failures.append(output[1])
    return output


def _write_files(write_preloaded_data_multithread, transforms, use_msc, rank, buckets, results) -> None:
    """Puts an error that names the cause into the queue of results: Megatron's says that an assertion failed."""
    _failures.clear()
    outcomes: queue.Queue = queue.Queue()
    try:
        write_preloaded_data_multithread(transforms, use_msc, rank, buckets, outcomes)
        outcome = outcomes.get_nowait()
    except Exception as error:
        outcome = error
    if _failures:
        outcome = CheckpointError(_describe(_failures[0], buckets))
    results.put(outcome)


def _describe(error: Exception, buckets) -> str:
    """torch.save replaces the disk's error by its own: the first one is in its context."""
    while not isinstance(error, OSError) and error.__context__ is not None:
        error = error.__context__
    text = " ".join(str(error).split())
    names = ", ".join(str(bucket[0]) for bucket in buckets)
    return f"{text if isinstance(error, OSError) else f'{type(error).__name__}: {text}'} in {names}"


_in_worker = False


def _copy_host_tensors(preload_tensors, buckets, non_blocking=True):
    """FileSystemWriterAsync.preload_tensors, with a copy of tensors that lie on the host.

    The run goes on, and changes its tensors, as soon as this function returns. Megatron copies tensors from the GPU
    only, so the worker would write what the run made of the tensors that both share.
    """
    preloaded = preload_tensors(buckets, non_blocking)
    if _in_worker:
        for (_, _, (_, copies)), (_, _, (_, tensors)) in zip(preloaded, buckets, strict=True):
            copies[:] = [
                (item, copy if tensor.is_cuda else copy.clone())
                for (item, copy), (_, tensor) in zip(copies, tensors, strict=True)
            ]
    return preloaded


def _end_with_run(function, *positional, **keywords):
    """Calls a function in a fork of this process."""
    child_processes.end_with_parent()
    return function(*positional, **keywords)


def _schedule(schedule_async_call, caller, request):
    """TemporalAsyncCaller.schedule_async_call, which forks for every checkpoint."""
    if request.async_fn is not None:
        request = request._replace(async_fn=partial(_end_with_run, request.async_fn))
    return schedule_async_call(caller, request)


def run_worker(*positional, **keywords) -> None:
    """The process that writes asynchronous checkpoints: a new interpreter, in which nothing is patched yet."""
    from megatron.core.dist_checkpointing.strategies.async_utils import PersistentAsyncCaller

    global _in_worker
    _in_worker = True
    child_processes.end_with_parent()
    PATCH.undo()  # for the original loop, where this process is a fork
    apply_all((SOCKETS, FILES))
    if torch.cuda.is_available():
        return PersistentAsyncCaller.async_loop(*positional, **keywords)
    from megatron_patches import cpu

    cpu._checkpoint_worker(*positional, **keywords)


_closing = False


def _start_worker(get_process, caller_class, rank, mp_mode="spawn", *positional, **keywords):
    """PersistentAsyncCaller._get_process. A child of this very process, and not of a fork server, can end with it."""
    global _closing
    if caller_class._persistent_process is not None:
        return caller_class._persistent_process
    _closing = False
    with child_processes.started_without_stop_signals():
        process = get_process(caller_class, rank, "spawn", *positional, **keywords)
    util.Finalize(None, _kill, (process,), exitpriority=100)
    threading.Thread(target=_watch, args=(process,), name="checkpoint-worker", daemon=True).start()
    return process


def _kill(process: multiprocessing.Process) -> None:
    """At the end of this process, before multiprocessing sends a SIGTERM, which the worker has blocked, and waits."""
    global _closing
    _closing = True
    process.kill()


def _watch(process: multiprocessing.Process) -> None:
    """Ends this process when the worker died: Megatron would wait for its results for ever."""
    connection.wait([process.sentinel])
    if not _closing:
        print(
            "error: the process that writes checkpoints died (killed, or out of memory): the run ends here, a restart "
            "resumes from the last complete checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _close(close, caller, *positional, **keywords):
    global _closing
    _closing = True
    return close(caller, *positional, **keywords)


def _without_file(init, listener, address=None, family=None, backlog=1, authkey=None) -> None:
    """Listener.__init__ with a name in Linux's abstract namespace. A process that connects must have the key."""
    if address is None and family is None and authkey is not None and sys.platform.startswith("linux"):
        address = f"\0listener-{uuid.uuid4().hex}"
    init(listener, address, family, backlog, authkey)


SOCKETS = Patch(
    name="listeners-without-files",
    reason="a run that is killed leaves the sockets, and their folder, through which it sends tensors to its children",
    removed_when="multiprocessing.connection makes listeners that have a key without a file",
    targets=(wrap("multiprocessing.connection", "Listener.__init__", _without_file),),
)

FILES = Patch(
    name="checkpoint-files",
    reason="what stops the writing of a checkpoint's file is lost on the way to the message; tensors on the host "
    "change while the worker of --async-save writes them",
    removed_when="write_preloaded_data_multithread puts the exception of a file into its queue, and preload_tensors "
    "copies every tensor",
    targets=(
        wrap(_WRITER, "FileSystemWriterAsync.preload_tensors", _copy_host_tensors),
        wrap(_WRITER, "FileSystemWriterAsync.write_preloaded_data", _write_file),
        wrap(_WRITER, "FileSystemWriterAsync.write_preloaded_data_multithread", _write_files),
    ),
)

PATCH = Patch(
    name="checkpoint-writer",
    reason="helper processes of the checkpoint writer die of a SIGTERM to the whole job, and outlive a run that is "
    "killed",
    removed_when="get_write_results_queue needs no process, and the persistent worker ends with its run and not before",
    targets=(
        wrap(_WRITER, "get_write_results_queue", _results_queue),
        wrap(_ASYNC, "TemporalAsyncCaller.schedule_async_call", _schedule),
        wrap(_ASYNC, "PersistentAsyncCaller._get_process", _start_worker),
        wrap(_ASYNC, "PersistentAsyncCaller.close", _close),
        replace(_ASYNC, "PersistentAsyncCaller.async_loop", run_worker),
    ),
)
