"""What to train next, and on which GPU: rates first, then the other seeds, then more steps until curves are flat."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import triton

from linear_moe.recall import records
from linear_moe.recall.baselines import MATCHES, TIME, Comparison, all_mixers, compare
from linear_moe.recall.models import Mixer
from linear_moe.recall.timing import compile_kernels, step_milliseconds
from linear_moe.recall.training import Job, OutOfTime, Settings, free_memory, train_group

TIMED_HEADS = (1, 2, 4, 8, 16)  # heads whose time is measured in search of a baseline as slow as MoM
OUT_OF_TIME = 3  # exit status of a process that the time limit ended


@dataclass(frozen=True)
class Plan:
    """What a run of the tool is to finish.

    Attributes:
        moms: the MoM models to compare with their baselines.
        settings: of all models; ``settings.training.steps`` is the first number of steps.
        max_steps: the steps are doubled, for all models, until the best curves are flat or this is passed.
        rates: learning rates, all tried on the first seed; the best goes on to the other seeds.
        seeds: of weights and batches.
        baselines: what is equal to MoM in them.
        all_rates: try all rates on all seeds.
        group_size: models that train at once on a GPU, at most.
    """

    moms: tuple[Mixer, ...]
    settings: Settings
    max_steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    baselines: tuple[str, ...] = tuple(MATCHES.values())
    all_rates: bool = False
    group_size: int = 16

    def with_steps(self, steps: int) -> Settings:
        return replace(self.settings, training=replace(self.settings.training, steps=steps))

    def step_counts(self) -> list[int]:
        """The numbers of steps that may be tried, each twice the one before."""
        counts = [self.settings.training.steps]
        while 2 * counts[-1] <= self.max_steps:
            counts.append(2 * counts[-1])
        return counts


class StepTimes:
    """Times of single models, measured when first needed and kept in a CSV file.

    Attributes:
        failures: {mixer: why its step does not run on this device}.
    """

    def __init__(self, path: Path, settings: Settings, device: torch.device, origin: records.Row, say=print):
        self.path, self.settings, self.device, self.origin, self.say = path, settings, device, origin, say
        self.failures: dict[Mixer, Exception] = {}
        self.rows = records.read(path)

    def __call__(self, mixer: Mixer) -> float:
        """Milliseconds of a step. Raises what the step raised where that does not run."""
        if mixer in self.failures:
            raise self.failures[mixer]
        row = self.find(mixer)
        if row is None:
            try:
                milliseconds = step_milliseconds(mixer, self.settings, self.device)
            except Exception as error:  # a size that no kernel of this chip takes leaves the other models alone
                self.failures[mixer] = error
                raise
            row = records.time_row(mixer, self.settings, milliseconds, self.origin)
            records.append(self.path, [row])
            self.rows.append(row)
            self.say(f"{mixer.name}: {milliseconds:.3f} ms a step alone")
        return float(row["ms"])

    def find(self, mixer: Mixer) -> records.Row | None:
        """The row of a mixer that has been timed on this device."""
        wanted = records.settings_row(mixer, self.settings) | {"device": self.origin["device"]}
        del wanted["steps"]  # a step takes as long however many follow
        return records.find(self.rows, wanted)


def find_comparisons(plan: Plan, times: StepTimes) -> list[Comparison]:
    """The comparisons of a plan, without the baselines whose step does not run on this device.

    Raises what a MoM model's step raised where that does not run.
    """
    if times.device.type == "cuda":
        _compile(plan, times)
    comparisons = []
    for mom in plan.moms:
        times(mom)
        comparison = compare(mom, plan.settings.shape, plan.settings.task.vocabulary, times, plan.baselines)
        running = {}
        for name, mixer in comparison.baselines.items():
            try:
                times(mixer)
                running[name] = mixer
            except Exception as error:
                times.say(f"{mixer.name} ({name}) does not run here and is left out: {type(error).__name__}: {error}")
        comparisons.append(Comparison(mom, running))
    return comparisons


def _compile(plan: Plan, times: StepTimes) -> None:
    """Compiles what is to be timed on all cores; on a machine with an empty cache all that is to be trained."""
    wanted = []
    for mom in plan.moms:
        alone = mom.alone
        wanted += compare(mom, plan.settings.shape, plan.settings.task.vocabulary, wanted=plan.baselines).mixers
        if TIME in plan.baselines:
            wanted += [replace(alone, heads=alone.heads * factor) for factor in TIMED_HEADS]
    cache = Path(triton.knobs.cache.dir)
    empty = not cache.is_dir() or not any(cache.iterdir())
    wanted = [mixer for mixer in dict.fromkeys(wanted) if empty or times.find(mixer) is None]
    if len(wanted) > 1:
        start = time.monotonic()
        compile_kernels(wanted, plan.settings, times.device)
        times.say(f"kernels of {len(wanted)} models compiled in {time.monotonic() - start:.0f} s")


def finished_rows(rows: Iterable[records.Row], settings: Settings) -> dict[Job, records.Row]:
    """The rows that were made with these settings, by job."""
    found = {}
    for row in map(records.completed, rows):
        job = Job(records.mixer_of(row), float(row["rate"]), int(row["seed"]))
        if all(row[name] == value for name, value in records.job_row(job, settings).items()):
            found[job] = row
    return found


def best_rates(mixers: Sequence[Mixer], plan: Plan, rows: dict[Job, records.Row]) -> dict[Mixer, float]:
    """The rate of the highest accuracy, of every mixer that has tried all rates on the seeds that choose."""
    seeds, best = plan.seeds if plan.all_rates else plan.seeds[:1], {}
    for mixer in mixers:
        jobs = {rate: [Job(mixer, rate, seed) for seed in seeds] for rate in plan.rates}
        if all(job in rows for tried in jobs.values() for job in tried):
            score = {rate: sum(records.mean_accuracy(rows[job]) for job in tried) for rate, tried in jobs.items()}
            best[mixer] = max(score, key=score.get)
    return best


def next_jobs(mixers: Sequence[Mixer], plan: Plan, rows: dict[Job, records.Row]) -> list[Job]:
    """The next jobs to train: all rates on the first seed, then the best rate on the other seeds."""
    seeds = plan.seeds if plan.all_rates else plan.seeds[:1]
    jobs = [Job(mixer, rate, seed) for mixer in mixers for seed in seeds for rate in plan.rates]
    missing = [job for job in jobs if job not in rows]
    if missing:
        return missing
    best = best_rates(mixers, plan, rows)
    jobs = [Job(mixer, best[mixer], seed) for mixer in mixers for seed in plan.seeds]
    return [job for job in jobs if job not in rows]


def all_flat(mixers: Sequence[Mixer], plan: Plan, rows: dict[Job, records.Row]) -> bool:
    """Whether every mixer's curves at its best rate are flat."""
    best = best_rates(mixers, plan, rows)
    return all(rows[Job(mixer, best[mixer], seed)]["flat"] == "True" for mixer in mixers for seed in plan.seeds)


def cut_groups(jobs: Sequence[Job], size: int, devices: int) -> list[list[Job]]:
    """Groups of nearly equal size, at most ``size``, and one a device at least where there are as many jobs."""
    count = max(-(-len(jobs) // size), min(devices, len(jobs)))
    return [list(jobs[len(jobs) * i // count : len(jobs) * (i + 1) // count]) for i in range(count)]


def run(
    plan: Plan,
    output: Path,
    devices: Sequence[torch.device],
    deadline: float,
    origin: records.Row,
    say: Callable[[str], None] = print,
) -> tuple[list[Comparison], StepTimes, bool]:
    """Trains what is missing, until all is there or the time is over. Every finished group is written at once.

    Args:
        deadline: of ``time.monotonic()``.

    Returns:
        the comparisons, the times of single steps, and whether all is there.
    """
    for name in (records.TIMES, records.RESULTS):
        records.upgrade(output / name)
    times = StepTimes(output / records.TIMES, plan.settings, devices[0], origin, say)
    comparisons = find_comparisons(plan, times)
    mixers = all_mixers(comparisons)
    for steps in plan.step_counts():
        settings = plan.with_steps(steps)
        while jobs := next_jobs(mixers, plan, finished_rows(records.read(output / records.RESULTS), settings)):
            say(f"{len(jobs)} models to train for {steps} steps")
            if not train_jobs(jobs, plan, settings, output, devices, deadline, origin, say):
                return comparisons, times, False
        if all_flat(mixers, plan, finished_rows(records.read(output / records.RESULTS), settings)):
            break
        say(f"after {steps} steps some curves still rise")
    return comparisons, times, True


def train_jobs(jobs, plan, settings, output, devices, deadline, origin, say=print) -> bool:
    """Trains jobs in groups, on several GPUs a process each. Returns whether all were finished before the deadline."""
    groups = cut_groups(jobs, plan.group_size, len(devices))
    if len(devices) == 1 or len(groups) == 1:
        return train_groups(groups, settings, output, devices[0], deadline, origin, say)
    context = multiprocessing.get_context("spawn")
    left = deadline - time.monotonic()
    processes = [
        context.Process(target=_process, args=(groups[i :: len(devices)], settings, output, device, left, origin))
        for i, device in enumerate(devices[: len(groups)])
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
    failed = [process.exitcode for process in processes if process.exitcode not in (0, OUT_OF_TIME)]
    if failed:
        raise RuntimeError(f"a training process ended with status {failed[0]}; what it printed is above")
    return all(process.exitcode == 0 for process in processes)


def train_groups(groups, settings, output, device, deadline, origin, say=print) -> bool:
    """Trains groups one after the other on one device and writes their rows. Returns whether all were finished."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    for number, group in enumerate(groups, 1):
        say(f"group {number} of {len(groups)} on {device}: " + ", ".join(_label(job) for job in group))
        try:
            results = train_group(group, settings, device, deadline, say)
        except OutOfTime as error:
            say(f"time limit: {error}")
            return False
        records.append(output / records.RESULTS, [records.result_row(result, settings, origin) for result in results])
        for result in results:
            percent = " ".join(f"{100 * accuracy:.0f}" for accuracy in result.accuracy)
            say(f"{_label(result.job)}: {percent} %{'' if result.flat else ', still rising'}")
        if len(results) < len(group):
            return False  # the others of the group did not fit the time, and the next group would not either
        free_memory()
    return True


def _process(groups, settings, output, device, left, origin):
    def say(line: str) -> None:
        print(f"[{device}] {line}", flush=True)

    deadline = time.monotonic() + left
    raise SystemExit(0 if train_groups(groups, settings, output, device, deadline, origin, say) else OUT_OF_TIME)


def _label(job: Job) -> str:
    return f"{job.mixer.name} at {job.rate:g} seed {job.seed}"
