"""Runs shrunk commands: data, folders, processes, time limits."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from linear_moe.trials import processes
from linear_moe.trials.data import VOCABULARY
from linear_moe.trials.shrink import Trial
from linear_moe.trials.verdict import FAILS, TRAINS, Verdict, compare, judge, last_error

SOFTMAX, MOM, RESUMED, SOFTMAX_RESUMED = "softmax", "mom", "resumed", "softmax resumed"
RESUMES = {RESUMED: MOM, SOFTMAX_RESUMED: SOFTMAX}
"""A run that starts from a checkpoint -> the run that left the checkpoint."""
RUNS = (MOM, SOFTMAX, *RESUMES)
"""In the order in which they are made."""
WORD = ("--token-mixer", "mom")


@dataclass(frozen=True)
class Place:
    """Where trials run: Megatron's clone, the folder of logs and checkpoints, the data, and the limit of a run."""

    clone: Path
    output: Path
    data: Path
    seconds: float

    @property
    def tokenizer(self) -> Path:
        return self.data.with_name("tokenizer")


def write_data(place: Place) -> None:
    """Writes the data of all trials, by the clone's Megatron."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(place.clone), str(processes.ROOT), *filter(None, sys.path)])
    }
    command = [sys.executable, "-W", "ignore", "-m", "linear_moe.trials.data", str(place.data)]
    subprocess.run(command, env=environment, check=True)


def has_dataset_helpers(clone: Path) -> bool:
    """Whether the clone's compiled helpers of data sets are there, or need not be."""
    folder = clone / "megatron" / "core" / "datasets"
    return not folder.is_dir() or any(folder.glob("helpers_cpp*.so"))


def provide_dataset_helpers(clone: Path) -> None:
    """Gives a clone the compiled helpers of the installed Megatron where it has none: training processes would all
    compile them at once.
    """
    if has_dataset_helpers(clone):
        return
    installed = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    folder = clone / "megatron" / "core" / "datasets"
    if installed is not None and installed.origin and Path(installed.origin).parent != folder:
        shutil.copy2(installed.origin, folder)
    else:
        subprocess.run(["make", "-C", str(folder)], check=True, stdout=subprocess.DEVNULL)


def command_of(trial: Trial, kind: str, place: Place, folder: Path) -> list[str]:
    """The words of a run behind `python -m`, with files and folders."""
    folders = {"--save": folder / "checkpoints", "--load": folder / "checkpoints"}
    data = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY)]
    if "--fim-data" in trial.words:  # its special tokens have names
        data = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(place.tokenizer)]
    if "--mock-data" not in trial.words:
        data += ["--data-path", str(place.data), "--data-cache-path", str(folder / "cache"), "--split", "90,5,5"]
    return [
        "linear_moe", str(place.clone / trial.script), *trial.words, *data,
        *(str(word) for option in folders.items() for word in option), "--save-interval", str(trial.save_interval),
        "--eval-interval", "1000",
        *(WORD if kind in (MOM, RESUMED) else []),
    ]  # fmt: skip


def run(trial: Trial, kind: str, place: Place) -> tuple[Verdict, float]:
    """Runs a trial: `SOFTMAX`, `MOM`, or one of `RESUMES`. Returns the verdict and the seconds. Output goes to a log
    beside the trial's folder.
    """
    folder = place.output / "runs" / trial.name.replace("/", "_") / RESUMES.get(kind, kind)
    if kind in RESUMES:
        _go_back(folder / "checkpoints", trial.save_interval)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    log = _log(trial, kind, place)
    words = command_of(trial, kind, place, folder)
    start = time.monotonic()
    status = processes.run(words, trial.processes, place.clone, folder, log, place.seconds)
    seconds = time.monotonic() - start
    output = log.read_text(errors="replace")
    if kind not in RESUMES:
        return judge(status, output, trial.steps), seconds
    if status != 0:
        why = "no end within the time limit" if status is None else last_error(output)
        return Verdict(FAILS, why or f"exit status {status} without an error"), seconds
    difference = compare(_log(trial, RESUMES[kind], place).read_text(errors="replace"), output, trial.save_interval)
    return Verdict(FAILS, difference) if difference else Verdict(TRAINS, "exact"), seconds


def _log(trial: Trial, kind: str, place: Place) -> Path:
    logs = place.output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    return logs / f"{trial.name.replace('/', '_')}.{kind.replace(' ', '_')}.txt"


def _go_back(checkpoints: Path, step: int) -> None:
    """Makes a step's checkpoint the last. (--ckpt-step takes a part of the torch format's from the last.)"""
    for later in checkpoints.glob("iter_*"):
        if int(later.name.removeprefix("iter_")) > step:
            shutil.rmtree(later)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(str(step))


def has_checkpoint(trial: Trial, kind: str, place: Place) -> bool:
    """Whether a run left a checkpoint at half of its steps."""
    folder = place.output / "runs" / trial.name.replace("/", "_") / kind / "checkpoints"
    return (folder / f"iter_{trial.save_interval:07d}").is_dir()


def clean(trial: Trial, place: Place) -> None:
    """Removes the checkpoints and caches of a trial; logs stay."""
    shutil.rmtree(place.output / "runs" / trial.name.replace("/", "_"), ignore_errors=True)
