"""A rehearsal of every model, and how many tokens all can be trained on before the time limit."""

from __future__ import annotations

import heapq
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from linear_moe.evidence import tables
from linear_moe.evidence.jobs import Job
from linear_moe.evidence.runs import OutOfTime, Place, RunFailed, call_trainer, measure, read_history

STEPS = 24  # of a rehearsal
INTERVAL = 4  # steps; the first intervals compile kernels and are not counted
START_SECONDS = 25  # of a training: imports, data, the first step with compiled kernels, the checkpoint
MARGIN = 1.04  # of the training time: validation, steps that vary
UNIT = 1_000_000  # tokens are a multiple of this


def rehearse(
    jobs: Sequence[Job], place: Place, lengths: Sequence[int], say: Callable[[str], None]
) -> dict[Job, float | None]:
    """Trains the first jobs, one on each device, for a few steps on random tokens, and measures them at every length.

    Compiles their kernels on the way. Returns the tokens a second; None for a job that does not run, which is said.
    """
    chosen = list(jobs)[: len(place.devices)]

    def attempt(job: Job, device: int | None) -> float | None:
        folder = place.folder / "rehearsal" / job.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        tokens = STEPS * job.training.batch * job.shape.length
        short = replace(job, training=replace(job.training, tokens=tokens))
        words = [*short.arguments(), "--mock-data", "--no-create-attention-mask-in-dataloader"]
        words += ["--tokenizer-type", "NullTokenizer", "--vocab-size", job.shape.vocabulary - 1]
        words += ["--log-interval", INTERVAL, "--eval-iters", 0, "--eval-interval", STEPS]
        words += ["--save", folder / "checkpoints", "--save-interval", STEPS]
        try:
            if not call_trainer(words, folder, device, place.deadline):
                raise OutOfTime("the time is up")
            # The highest: other processes, such as the making of the corpus, only slow a run down.
            speed = max(tables.speeds(read_history(folder)), default=0.0)
            say(f"{job.name}: {speed:,.0f} tokens/s")
            measure(folder, _random_windows(folder, job.shape.vocabulary, lengths), place, device)
        except (RunFailed, OutOfTime) as error:
            say(f"{job.name} does not run: {error}")
            return None
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        return speed or None

    with ThreadPoolExecutor(len(chosen)) as threads:
        return dict(zip(chosen, threads.map(attempt, chosen, place.devices), strict=True))


def _random_windows(folder: Path, vocabulary: int, lengths: Sequence[int]) -> list[Path]:
    paths = []
    for length in lengths:
        paths.append(folder / f"random_{length}.npy")
        np.save(paths[-1], np.random.default_rng(0).integers(vocabulary, size=(2, length + 1)))
    return paths


def seconds_needed(jobs: Sequence[Job], speeds: dict[Job, float], devices: int, tokens: int, measure: float) -> float:
    """Until the last job ends, where every job starts on the first device that is free.

    A job whose speed was not measured counts as the job before it: the jobs come the slowest first.
    """
    free, speed = [0.0] * devices, min(speeds.values())
    for job in jobs:
        speed = speeds.get(job, speed)
        heapq.heappush(free, heapq.heappop(free) + MARGIN * tokens / speed + START_SECONDS + measure)
    return max(free)


def fit_tokens(jobs: Sequence[Job], speeds: dict[Job, float], devices: int, seconds: float, measure: float) -> int:
    """The largest number of tokens, up to what the jobs have, with which all jobs end within the time.

    Raises ValueError where not even UNIT tokens fit.
    """
    most = max(job.training.tokens for job in jobs)
    low, high = 0, max(1, most // UNIT)
    while low < high:
        middle = (low + high + 1) // 2
        if seconds_needed(jobs, speeds, devices, middle * UNIT, measure) <= seconds:
            low = middle
        else:
            high = middle - 1
    if not low:
        raise ValueError(f"{seconds:.0f} s are too few for {len(jobs)} models: give a larger --time-limit")
    return min(most, low * UNIT)
