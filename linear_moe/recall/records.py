"""Rows of finished models and of measured times, in CSV files that a later run goes on from."""

from __future__ import annotations

import csv
import fcntl
import importlib.metadata
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from linear_moe.recall.models import Mixer, count_parameters
from linear_moe.recall.training import Job, Result, Settings
from linear_moe.temporary import replaced_file

RESULTS, TIMES = "recall.csv", "step_times.csv"
ORIGIN = ("device", "torch", "triton", "commit", "command")
LATER_COLUMNS = {"text_conv": ("shared", "0")}
"""Columns that older files lack: {column: (the column before, value of the models in older files)}."""
Row = dict[str, str]


def origin(device: torch.device, commit: str, command: str) -> Row:
    """Where a row comes from: device, versions, commit and command."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    values = (name, torch.__version__, importlib.metadata.version("triton"), commit, command)
    return dict(zip(ORIGIN, values, strict=True))


def commit_of(folder: Path) -> str:
    """The commit that is checked out in a folder, with "+changes" where files differ from it; else "unknown"."""
    try:
        words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+changes"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_row(mixer: Mixer, settings: Settings) -> Row:
    """All settings of a model but rate and seed, as a CSV file has them."""
    values = asdict(mixer) | asdict(settings.task) | asdict(settings.shape) | asdict(settings.training)
    return {name: _shown(value) for name, value in values.items()}


def job_row(job: Job, settings: Settings) -> Row:
    """What tells one trained model from every other."""
    return settings_row(job.mixer, settings) | {"rate": _shown(job.rate), "seed": str(job.seed)}


def result_row(result: Result, settings: Settings, origin: Row) -> Row:
    """A line of RESULTS: settings, sizes, accuracy for every number of pairs, curve, origin."""
    mixer = result.job.mixer
    return {
        "model": mixer.name,
        **job_row(result.job, settings),
        "state": str(mixer.state),
        "parameters": str(count_parameters(mixer, settings.shape, settings.task.vocabulary)),
        "accuracy": " ".join(f"{value:.5f}" for value in result.accuracy),
        "loss": f"{result.loss:.5f}",
        "flat": str(result.flat),
        "curve": " ".join(f"{step}:{accuracy:.4f}" for step, accuracy in result.curve),
        "seconds": f"{result.seconds:.1f}",
        "group": str(result.group),
        **origin,
    }


def time_row(mixer: Mixer, settings: Settings, milliseconds: float, origin: Row) -> Row:
    """A line of TIMES."""
    return {"model": mixer.name, **settings_row(mixer, settings), "ms": f"{milliseconds:.5f}", **origin}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a CSV file, with a header where it is new; several processes may do so at once.

    Raises ValueError where the file has other columns.
    """
    rows = list(rows)
    if not rows:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        file.truncate(len(text[: text.rfind("\n") + 1].encode()))  # a line that a kill cut short
        header = next(csv.reader(text.splitlines()[:1]), None) if "\n" in text else None
        if header is not None and header != list(rows[0]):
            raise ValueError(f"{path} has other columns than this version writes: name another --output folder")
        writer = csv.DictWriter(file, list(rows[0]))
        if header is None:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file; none where there is no file. A last line without its end, from a kill, is left out."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        text = file.read()
    return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))


def completed(row: Row) -> Row:
    """A row of RESULTS or TIMES with all columns: what an older version wrote gets the later columns."""
    for name, (before, value) in LATER_COLUMNS.items():
        if name not in row and before in row:
            place = list(row).index(before) + 1
            row = dict([*list(row.items())[:place], (name, value), *list(row.items())[place:]])
    return row


def upgrade(path: Path) -> None:
    """Gives RESULTS or TIMES, where an older version wrote it, the later columns, so that rows can be added to it."""
    rows = read(path)
    if all(row == completed(row) for row in rows):
        return
    with replaced_file(path) as partial:
        append(partial, map(completed, rows))


def find(rows: Iterable[Row], wanted: Row) -> Row | None:
    """The first row that has all the wanted values."""
    return next((row for row in rows if all(row.get(name) == value for name, value in wanted.items())), None)


def mixer_of(row: Row) -> Mixer:
    row = completed(row)
    numbers = {name: int(row[name]) for name in ("heads", "key_size", "value_size", "memories", "topk", "text_conv")}
    return Mixer(row["rule"], shared=row["shared"] == "True", **numbers)


def pairs_of(row: Row) -> dict[int, float]:
    """{number of pairs: accuracy}."""
    return dict(zip(map(int, row["pairs"].split()), map(float, row["accuracy"].split()), strict=True))


def mean_accuracy(row: Row) -> float:
    """Averaged over the numbers of pairs."""
    values = pairs_of(row).values()
    return sum(values) / len(values)


def curve_of(row: Row) -> list[tuple[int, float]]:
    points = (point.split(":") for point in row["curve"].split())
    return [(int(step), float(accuracy)) for step, accuracy in points]
