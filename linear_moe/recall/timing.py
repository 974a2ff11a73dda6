"""How long one model's step takes when nothing else runs: forward, backward, clipping and AdamW."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait

import torch

from linear_moe.recall.models import Mixer
from linear_moe.recall.task import Sampler
from linear_moe.recall.training import Job, Settings, TrainedModel, free_memory

REPEATS = 5  # medians are of so many
SECONDS = 0.1  # that each repeat takes, about, on a GPU


def step_milliseconds(mixer: Mixer, settings: Settings, device: torch.device) -> float:
    """Median time of a step in milliseconds: a CUDA graph's replay, or the step as the host issues it on a CPU."""
    batch = Sampler(settings.task, device, 0).draw()
    model = TrainedModel(Job(mixer, 1e-3, 0), settings, batch, torch.zeros((), device=device))
    if device.type != "cuda":
        model.step()
        return statistics.median(_seconds(model, 1) for _ in range(REPEATS)) * 1e3
    model.capture()
    _seconds(model, 20)
    count = max(1, round(SECONDS / (_seconds(model, 20) / 20)))
    milliseconds = statistics.median(_seconds(model, count) / count for _ in range(REPEATS)) * 1e3
    del model
    free_memory()
    return milliseconds


def compile_kernels(mixers: Sequence[Mixer], settings: Settings, device: torch.device) -> None:
    """Runs a step and an evaluation of every mixer, each in its own process, all at once: Triton keeps their kernels.

    A step that fails here fails again, and is reported, when the mixer is timed.
    """
    workers = min(len(mixers), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        wait([pool.submit(_one_step, mixer, settings, device) for mixer in mixers])


def _one_step(mixer: Mixer, settings: Settings, device: torch.device) -> None:
    sampler = Sampler(settings.task, device, 0)
    batch = sampler.draw()
    model = TrainedModel(Job(mixer, 1e-3, 0), settings, batch, torch.zeros((), device=device))
    model.step()
    model.accuracy([batch], sampler.pairs_of_query)


def _seconds(model: TrainedModel, count: int) -> float:
    """Time of steps one after another."""
    if model.graph is not None:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        if model.graph is None:
            model.step()
        else:
            model.graph.replay()
    if model.graph is not None:
        torch.cuda.synchronize()
    return time.perf_counter() - start
