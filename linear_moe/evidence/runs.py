"""Trains and measures the models of a comparison, one on each GPU at a time, and keeps what is finished."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from linear_moe.evidence import tables
from linear_moe.evidence.held_out import HeldOut
from linear_moe.evidence.jobs import Job
from linear_moe.evidence.measure import losses_path

HISTORY, LOG = "history.jsonl", "log.txt"
POLL_SECONDS = 0.5
STOP_SECONDS = 40  # that a run may take to save a checkpoint when the time is up
SHOWN_LINES = 15  # of the log of a process that failed

Device = int | str | None

_ending = threading.Event()  # set when the program ends before its processes


class OutOfTime(Exception):
    """The time limit ended a job."""


class RunFailed(Exception):
    """A process ended with an error; the message has the end of its output."""


@dataclass(frozen=True)
class Place:
    """Where jobs run.

    Attributes:
        folder: a folder for every job is made here.
        data: prefix of the training data, and of the held-out data.
        tokenizer: folder of the tokenizer.
        devices: numbers of the GPUs, each for one model at a time: of a GPU, or of several, as "0,1"; None stands for
            the CPU.
        deadline: on the clock of ``time.monotonic``.
        measure_seconds: left for measuring when a training is stopped for lack of time.
    """

    folder: Path
    data: tuple[Path, Path]
    tokenizer: Path
    devices: tuple[Device, ...]
    deadline: float = float("inf")
    measure_seconds: float = 0.0


def run_all(
    jobs: Sequence[Job],
    place: Place,
    held_out: Future[list[HeldOut]],
    facts: dict,
    origin: tables.Row,
    say: Callable[[str], None],
) -> tuple[list[Job], list[Job]]:
    """Runs the jobs in their order, each on the first GPU that is free, until the deadline.

    Args:
        held_out: becomes the windows; trainings begin before.
        facts: of the training data.

    Returns:
        jobs that failed, and jobs that the time did not suffice for.
    """
    waiting: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        waiting.put(job)
    failed, late = [], []

    def work(device: Device) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            if _ending.is_set():
                return
            try:
                run(job, place, device, held_out, facts, origin, say)
            except OutOfTime as error:
                late.append(job)
                say(f"{job.key}: {error}")
            except Exception as error:  # of one model; the others go on
                failed.append(job)
                say(f"{job.key} failed: {error if isinstance(error, RunFailed) else repr(error)}")

    with ThreadPoolExecutor(len(place.devices)) as pool:
        workers = [pool.submit(work, device) for device in place.devices]
        try:
            wait(workers)
        finally:  # an interrupt ends the processes too, each with a checkpoint
            _ending.set()
            wait(workers)
            _ending.clear()
    return failed, late


def run(
    job: Job,
    place: Place,
    device: Device,
    held_out: Future[list[HeldOut]],
    facts: dict,
    origin: tables.Row,
    say: Callable[[str], None],
) -> None:
    """Trains a model, where it is not trained yet, measures it, and writes its rows."""
    folder = place.folder / job.key
    folder.mkdir(parents=True, exist_ok=True)
    if time.monotonic() >= place.deadline - place.measure_seconds:
        raise OutOfTime("not begun: no time is left")
    if trained_steps(folder) < job.steps:
        start = time.monotonic()
        say(f"{job.key}: {job.steps} steps on {'the CPU' if device is None else f'GPU {device}'}")
        train(job, folder, place, device)
        speed = tables.speed(read_history(folder))
        say(f"{job.key}: trained in {time.monotonic() - start:.0f} s, {speed:,.0f} tokens/s")
    windows = held_out.result()
    if tables.find(place.folder, job, facts["digest"]) is None:
        losses, about = measure(folder, [found.path for found in windows], place, device)
        tables.write(place.folder, job, facts, windows, losses, about, read_history(folder), origin)
        say(f"{job.key}: {tables.shown(windows, losses)}")
    if job.mixer.memories > 1:
        describe_memories(job, folder, windows[0].path, place, device)


def is_finished(job: Job, folder: Path, data: str) -> bool:
    """Whether a job has its row; and, where its checkpoint is still there, what its memories hold. data: the digest."""
    if tables.find(folder, job, data) is None:
        return False
    described = job.mixer.memories <= 1 or memories_path(folder, job).is_file()
    return described or trained_steps(folder / job.key) < job.steps


def memories_path(folder: Path, job: Job) -> Path:
    """The file that says what a model's memories hold."""
    return folder / f"memories_{job.key}.json"


def describe_memories(job: Job, folder: Path, windows: Path, place: Place, device: Device) -> None:
    """Writes memories_KEY.json, which says what the model's memories hold. Raises OutOfTime and RunFailed."""
    output = memories_path(place.folder, job)
    words = [sys.executable, "-m", "linear_moe.evidence.memories", folder / "checkpoints", output, windows]
    if not _call([*words, place.tokenizer], folder, device, place.deadline):
        raise OutOfTime("what its memories hold was not written")


def train(job: Job, folder: Path, place: Place, device: Device) -> None:
    """Runs `linear_moe.pretrain` to the end, from its latest checkpoint.

    Raises OutOfTime where the deadline stopped the run, which saves a checkpoint then, and RunFailed.
    """
    training, held_out = place.data
    every = max(1, job.steps // 10)
    words = [*job.arguments()]
    words += ["--train-data-path", training, "--valid-data-path", held_out, "--data-cache-path", folder / "data"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", place.tokenizer]
    words += ["--no-create-attention-mask-in-dataloader", "--log-interval", max(1, min(10, every))]
    words += ["--eval-interval", every, "--eval-iters", 4]
    words += ["--save", folder / "checkpoints", "--load", folder / "checkpoints", "--save-interval", max(1, job.steps)]
    words += ["--exit-signal-handler"]
    if not call_trainer(words, folder, device, place.deadline - place.measure_seconds):
        raise OutOfTime(f"stopped at step {trained_steps(folder)} of {job.steps}: the same command goes on from there")
    if trained_steps(folder) < job.steps:
        raise RunFailed(f"the training ended at step {trained_steps(folder)} of {job.steps}, see {folder / LOG}")


def call_trainer(words: Sequence, folder: Path, device: Device, deadline: float = float("inf")) -> bool:
    """Runs `linear_moe.pretrain` with these arguments, and keeps its history and its log in a folder.

    Returns False where the deadline came first. Raises RunFailed.
    """
    gpus = str(device).count(",") + 1
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", gpus] if gpus > 1 else []
    module = [sys.executable, *ranks, "-m", "linear_moe.evidence.recorded_run", folder / HISTORY]
    return _call([*module, *words], folder, device, deadline)


def measure(folder: Path, paths: Sequence[Path], place: Place, device: Device) -> tuple[list[np.ndarray], dict]:
    """The losses [W, L] of the windows in files, by the model in a job's folder, and the model's parameters.

    Raises OutOfTime and RunFailed.
    """
    output = folder / "measured.json"
    words = [sys.executable, "-m", "linear_moe.evidence.measure", folder / "checkpoints", output, *paths]
    if not _call(words, folder, device, place.deadline):
        raise OutOfTime("the measurement was stopped: the same command measures again")
    losses = [np.load(losses_path(output, path)) for path in paths]
    return losses, json.loads(output.read_text())


def trained_steps(folder: Path) -> int:
    """The step of the latest checkpoint; 0 without a checkpoint."""
    tracker = folder / "checkpoints" / "latest_checkpointed_iteration.txt"
    return int(tracker.read_text()) if tracker.is_file() else 0


def read_history(folder: Path) -> list[dict]:
    """The lines of recorded_run.py, by step: those of a run that was started again replace the older ones."""
    path, lines = folder / HISTORY, {}
    if path.is_file():
        for text in path.read_text().splitlines():
            line = json.loads(text)
            kind = "validation" in line
            lines = {key: kept for key, kept in lines.items() if key[1] != kind or key[0] < line["step"]}
            lines[line["step"], kind] = line
    return [lines[key] for key in sorted(lines)]


def _call(words: Sequence, folder: Path, device: Device, deadline: float) -> bool:
    """Runs a process to its end; False where the deadline came first. Its output is added to the log.

    At the deadline the process gets SIGTERM, after STOP_SECONDS more SIGKILL. Raises RunFailed for an error of the
    process.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    log = folder / LOG
    with log.open("ab") as file:
        process = subprocess.Popen(
            list(map(str, words)), stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            stopped = 0.0
            while process.poll() is None:
                now = time.monotonic()
                if not stopped and (now >= deadline or _ending.is_set()):
                    stopped = now
                    process.terminate()
                if stopped and now >= stopped + STOP_SECONDS:
                    os.killpg(process.pid, signal.SIGKILL)
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if stopped:
        return False
    if process.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:])
        raise RunFailed(f"exit status {process.returncode}, the end of {log}:\n{end}")
    return True
