"""Tries the training commands of Megatron-LM's users on a CPU, with --token-mixer mom and without.

The command line is linear_moe/commands/arguments/try_megatron_commands.py.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CalledProcessError

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from linear_moe.commands import run_command  # noqa: E402
from linear_moe.commands.arguments.try_megatron_commands import parse_arguments  # noqa: E402
from linear_moe.trials import argument_sets, processes, runs  # noqa: E402
from linear_moe.trials.argument_sets import ArgumentSet  # noqa: E402
from linear_moe.trials.shrink import Trial, shrink  # noqa: E402
from linear_moe.trials.table import LONGEST_REASON, Rows, markdown, summary  # noqa: E402
from linear_moe.trials.verdict import FAILS, TRAINS  # noqa: E402

PUBLIC = Path(argument_sets.__file__).with_name("public_scripts.yaml")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns 0, or 1 for a folder that is no clone. SystemExit(2): a wrong command line."""
    args = parse_arguments(argv)
    return run_command("try_megatron_commands.py", lambda: try_commands(args), ValueError, CalledProcessError)


def try_commands(args: argparse.Namespace) -> None:
    """Runs what is still to be run, and writes rows and table. Raises ValueError for a folder that is no clone."""
    start = time.monotonic()
    deadline = start + args.time_limit
    sets = chosen(args)
    trials = [shrink(given) for given in sets]
    if args.list:
        for trial in trials:
            print(f"{trial.name}: {trial.processes} processes: {trial.script} {' '.join(trial.words)}")
        return
    output = args.output.absolute()
    place = runs.Place(args.clone.absolute(), output, output / "data" / "text", args.limit)
    runs.provide_dataset_helpers(place.clone)
    runs.write_data(place)
    rows = Rows(output / "commands.csv")
    if args.again is not None:
        rows.forget(args.again or [FAILS])

    stopped = threading.Event()

    def attempt(trial: Trial, *same: Trial) -> None:
        rows.share([trial.name, *(other.name for other in same)])
        made: set[str] = set()
        while not stopped.is_set() and time.monotonic() < deadline and (run := next_run(trial, rows, place, made)):
            made.add(run)
            verdict, seconds = runs.run(trial, run, place)
            if stopped.is_set():  # and the run's processes were ended
                return
            rows.add(
                set=trial.name, run=run, processes=str(trial.processes), result=verdict.result,
                reason=verdict.reason[:LONGEST_REASON], seconds=f"{seconds:.1f}",
            )  # fmt: skip
            rows.share([trial.name, *(other.name for other in same)], run)
            line = f"{trial.name} {run}: {verdict.result} {verdict.reason}"
            print(f"{time.monotonic() - start:5.0f} s {len(rows.rows):4d} {line[:300]}", flush=True)
        if not any(is_needed(trial, run, rows) for run in runs.RUNS):
            runs.clean(trial, place)

    names = [trial.name for trial in trials]
    pool = ThreadPoolExecutor(args.jobs)
    processes.server(place.clone)
    try:
        for attempted in [pool.submit(attempt, *same) for same in in_order(sets, trials)]:
            attempted.result()
    finally:
        stopped.set()
        pool.shutdown(wait=False, cancel_futures=True)
        processes.end_all()
        pool.shutdown()
        (output / "table.md").write_text(markdown(rows, names))
        print(summary(rows, names))
        print(output / "table.md")


def in_order(sets: list[ArgumentSet], trials: list[Trial]) -> list[list[Trial]]:
    """Trials whose shrunk commands are the same, together; the first of each kind of command before the others."""
    alike: dict[tuple, list[Trial]] = {}
    for trial in trials:
        alike.setdefault((trial.script, trial.words, trial.processes), []).append(trial)
    first = {given.name for given in argument_sets.one_of_each_kind(sets)}
    return sorted(alike.values(), key=lambda same: not any(trial.name in first for trial in same))


def next_run(trial: Trial, rows: Rows, place: runs.Place, made: set[str]) -> str | None:
    """The next run of a trial that this call has not made; None where nothing is left. A run whose checkpoint
    is gone is repeated, if another is to be resumed from the checkpoint.
    """
    for run in runs.RUNS:
        if run in made or not is_needed(trial, run, rows):
            continue
        first = runs.RESUMES.get(run)
        if first is None or runs.has_checkpoint(trial, first, place):
            return run
        if first not in made:
            return first
    return None


def is_needed(trial: Trial, run: str, rows: Rows) -> bool:
    """Whether a run is still to be made. A run that trains is resumed; with softmax only where the resumption of the
    run with memories differs, which may be Megatron's doing.
    """
    if rows.result(trial.name, run) is not None:
        return False
    if run in runs.RESUMES and rows.result(trial.name, runs.RESUMES[run]) != TRAINS:
        return False
    return run != runs.SOFTMAX_RESUMED or rows.result(trial.name, runs.RESUMED) == FAILS


def chosen(args: argparse.Namespace) -> list[ArgumentSet]:
    """The argument sets that the command line names. Raises ValueError where there is none."""
    sets = argument_sets.from_test_cases(args.clone) + argument_sets.from_examples(args.clone)
    if PUBLIC.is_file():
        sets += argument_sets.from_file(PUBLIC)
    if args.only:
        sets = [given for given in sets if any(text in given.name for text in args.only)]
    if unknown := set(args.exactly) - {given.name for given in sets}:
        raise ValueError(f"--exactly {' '.join(sorted(unknown))}: no set has such a name")
    if args.exactly:
        sets = [given for given in sets if given.name in args.exactly]
    if args.kinds:
        sets = argument_sets.one_of_each_kind(sets)
    if not sets:
        raise ValueError(f"--only {' '.join(args.only)}: no set has such a name")
    return sets
