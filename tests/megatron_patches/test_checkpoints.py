"""What keeps checkpoints whole: the tracker file, the queue of results, child processes, signals; and their patches."""

import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
import torch

from linear_moe.entry import run_checks
from megatron_patches import PatchError, applied, checkpoint_folder, checkpoint_writer, checkpoints
from megatron_patches.checkpoint_folder import CheckpointError, complete_iterations
from megatron_patches.checkpoint_tracker import TRACKER, read_tracker, written_whole
from megatron_patches.patch import apply_all, undo_all

ALL = (*checkpoints.patches(), run_checks.PATCH)


def stored_targets():
    def stored(target):
        *path, name = target.attribute.split(".")
        owner = reduce(getattr, path, import_module(target.module))
        return vars(owner).get(name, getattr(owner, name))

    return {str(target): stored(target) for patch in ALL for target in patch.targets}


def test_every_target_is_replaced_and_restored():
    before = stored_targets()
    apply_all(ALL)
    apply_all(ALL)
    during = stored_targets()
    undo_all(ALL)
    after = stored_targets()
    assert all(during[name] is not value and after[name] is value for name, value in before.items())
    assert applied() == ()


@pytest.mark.parametrize("patch", ALL, ids=lambda patch: patch.name)
def test_a_missing_target_is_named(patch, monkeypatch):
    target = patch.targets[-1]
    monkeypatch.delattr(import_module(target.module), target.attribute.split(".")[0])
    with pytest.raises(PatchError, match=f"'{patch.name}' cannot be applied: there is no {target.module}"):
        patch.apply()
    assert applied() == ()


@pytest.fixture
def folder(tmp_path):
    """Iteration 3 is complete, iteration 6 is not, and the tracker names 3."""
    for iteration in (3, 6):
        checkpoint = tmp_path / f"iter_{iteration:07d}"
        checkpoint.mkdir()
        (checkpoint / "__0_0.distcp").write_bytes(b"tensors")
        (checkpoint / ".metadata").write_bytes(b"metadata")
    (tmp_path / "iter_0000003" / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / TRACKER).write_text("3")
    checkpoint_folder.warn.cache_clear()
    return tmp_path


def test_the_tracker_is_replaced_as_a_whole(folder):
    path = folder / TRACKER
    with pytest.raises(OSError, match="full"), written_whole(path) as file:
        file.write("6")
        raise OSError("full")
    assert path.read_text() == "3" and not list(folder.glob("*.partial"))
    with written_whole(path) as file:
        file.write("6")
        assert path.read_text() == "3"
    assert path.read_text() == "6" and not list(folder.glob("*.partial"))


@pytest.mark.parametrize("content", [b"3", b" 3\n", b"release"])
def test_a_tracker_that_names_a_checkpoint_is_taken_as_it_is(folder, content, caplog):
    (folder / TRACKER).write_bytes(content)
    assert read_tracker(folder / TRACKER) == content.decode().strip() and not caplog.records


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds '', which is not the number of an iteration"),
        (b"\xff\x00\xfe", "which is not the number of an iteration"),
        (b"-3", "holds '-3', which is not the number"),
        (b"1e3", "holds '1e3', which is not the number"),
        (b"6", "holds '6', which names a checkpoint that is not complete"),
        (b"99", "holds '99', which names a checkpoint that is not there"),
    ],
)
def test_another_tracker_leads_to_the_newest_complete_checkpoint_or_to_an_error(folder, content, problem, caplog):
    (folder / TRACKER).write_bytes(content)
    assert read_tracker(folder / TRACKER) == "3"
    (record,) = caplog.records
    assert problem in record.getMessage() and "iteration 3" in record.getMessage()
    (folder / "iter_0000003" / "metadata.json").write_text("")
    with pytest.raises(CheckpointError, match="there is no complete checkpoint in"):
        read_tracker(folder / TRACKER)


def test_megatron_reads_and_writes_the_tracker_this_way(folder, caplog):
    checkpointing = import_module("megatron.training.checkpointing")
    patch = checkpoints.patches()[0]
    (folder / TRACKER).write_text("")
    with pytest.raises(SystemExit) as silent:
        checkpointing.read_metadata(str(folder / TRACKER))
    assert silent.value.code is None
    patch.apply()
    try:
        assert checkpointing.read_metadata(str(folder / TRACKER)) == (3, False)
        with checkpointing.maybe_msc.open(str(folder / TRACKER), "w") as file:
            file.write("6")
            assert (folder / TRACKER).read_text() == ""
        assert (folder / TRACKER).read_text() == "6"
        assert checkpointing.maybe_msc.os is os
    finally:
        patch.undo()


def test_complete_checkpoints_are_found_in_order(folder):
    for name in ("iter_0000012", "iter_0000009", "iter_x"):
        (folder / name).mkdir()
        (folder / name / "metadata.json").write_text("{}")
        (folder / name / ".metadata").write_bytes(b"metadata")
    assert complete_iterations(folder) == [3, 9, 12]


def test_the_queue_takes_results_of_this_process_and_of_its_children():
    results = checkpoint_writer.ResultsQueue()
    results.put(1)
    large = {"shards": list(range(100_000))}  # more than a pipe holds
    for method in ("fork", "spawn"):
        child = multiprocessing.get_context(method).Process(target=results.put, args=(large,))
        child.start()
        child.join(60)
        assert child.exitcode == 0
    assert [results.get_nowait() for _ in range(3)] == [1, large, large]
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_listeners_with_a_key_leave_no_file(tmp_path):
    if not sys.platform.startswith("linux"):
        return
    program = (
        "import os, signal\nfrom megatron_patches import checkpoint_writer as w\n"
        "w.SOCKETS.apply(); w.ResultsQueue(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = run(program, TMPDIR=str(tmp_path))
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(tmp_path.glob("pymp-*"))


def test_the_worker_copies_tensors_that_it_shares_with_the_run(monkeypatch):
    tensor = torch.arange(4.0)
    buckets = [("path", "key", ([], [("item", tensor)]))]

    def preload(buckets, non_blocking):
        return [(path, key, (data, list(tensors))) for path, key, (data, tensors) in buckets]

    monkeypatch.setattr(checkpoint_writer, "_in_worker", True)
    ((_, _, (_, [(item, copy)])),) = checkpoint_writer._copy_host_tensors(preload, buckets)
    tensor += 1
    assert item == "item" and torch.equal(copy, torch.arange(4.0))


def run(program: str, **environment) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], env=environment, text=True, capture_output=True
    )


@contextmanager
def started(program: str, *words):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", program, *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


PARENT = """
import multiprocessing, os, signal, sys, time
from contextlib import nullcontext
from megatron_patches.child_processes import end_with_parent, started_without_stop_signals

context = multiprocessing.get_context("fork")
def child():
    end_with_parent()
    time.sleep(100)
with started_without_stop_signals():
    process = context.Process(target=child)
    process.start()
print(process.pid, flush=True)
time.sleep(100)
"""


def test_a_child_outlives_stop_signals_and_ends_with_its_parent():
    with started(PARENT) as parent:
        child = int(parent.stdout.readline())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(child, number)
        time.sleep(0.3)
        assert is_running(child)
        parent.kill()
        parent.wait()
        end = time.monotonic() + 20
        while is_running(child) and time.monotonic() < end:
            time.sleep(0.02)
        assert not is_running(child)


STOPPED = """
import sys, time
from megatron.training import dist_signal_handler
from megatron_patches import stop_signal
stop_signal.FORWARDED_WITHIN = float(sys.argv[1])
stop_signal.PATCH.apply()
handler = dist_signal_handler.DistributedSignalHandler().__enter__()
print("ready", flush=True)
while not handler._signal_received: time.sleep(0.01)
print("noted", flush=True)
time.sleep(2)
print("saved", flush=True)
"""


@pytest.mark.parametrize(("window", "status"), [("0", -signal.SIGTERM), ("60", 0)], ids=["second", "forwarded"])
def test_a_second_signal_aborts_but_not_the_first_one_forwarded(window, status):
    with started(STOPPED, window) as process:
        assert "ready\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGTERM)
        assert "noted\n" in iter(process.stdout.readline, "")
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert ("a second SIGTERM: aborted" in errors) == (status != 0) and ("saved" in output) == (status == 0)


@pytest.mark.parametrize("words", [["--ckpt-format", "fsdp_dtensor"], ["--ckpt-format=torch_dcp"]])
def test_pytorchs_formats_need_no_metadata_json(tmp_path, monkeypatch, words):
    (tmp_path / "iter_0000002").mkdir()
    (tmp_path / "iter_0000002" / ".metadata").write_text("written last")
    assert complete_iterations(tmp_path) == []
    monkeypatch.setattr("sys.argv", ["pretrain", *words])
    assert complete_iterations(tmp_path) == [2]
