"""Rows of finished models, in CSV files: models, losses by position, losses by repeat, and the course of training."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from linear_moe.evidence.held_out import HeldOut, by_position, by_repeat, summary
from linear_moe.evidence.jobs import Job
from linear_moe.recall import records

MODELS, POSITIONS, REPEATS, HISTORIES = "models.csv", "positions.csv", "repeats.csv", "training.csv"
Row = records.Row
UNTIMED = 2  # log intervals at the start: kernels are compiled


def find(folder: Path, job: Job, data: str) -> Row | None:
    """The row of a finished job that was trained on the text of a digest."""
    return records.find(records.read(folder / MODELS), job.row() | {"data": short(data)})


def short(digest: str) -> str:
    """What the rows say of a corpus's digest."""
    return digest[:12]


def write(
    folder: Path,
    job: Job,
    facts: dict,
    windows: Sequence[HeldOut],
    losses: Sequence[np.ndarray],
    about: dict,
    history: Sequence[dict],
    origin: Row,
) -> None:
    """Adds the rows of a finished model. The row of MODELS, which says that the model is finished, comes last."""
    name = {"key": job.key, "data": short(facts["digest"]), "model": job.name}
    records.append(folder / HISTORIES, [name | row for row in _history_rows(history, job)])
    records.append(folder / POSITIONS, [
        name | {"length": str(held_out.length), "first": str(first), "end": str(end), "loss": f"{loss:.5f}",
                "error": f"{error:.5f}"}
        for held_out, found in zip(windows, losses, strict=True)
        for first, end, loss, error in by_position(found)
    ])  # fmt: skip
    records.append(folder / REPEATS, [
        name | {"length": str(held_out.length), "longest": str(longest), "distance": str(distance),
                "frequency": str(frequency), "tokens": str(tokens), "loss": f"{loss:.5f}"}
        for held_out, found in zip(windows, losses, strict=True)
        for longest, distance, frequency, tokens, loss in by_repeat(found, held_out.repeats)
    ])  # fmt: skip
    records.append(folder / MODELS, [_model_row(job, facts, windows, losses, about, history, origin)])


def _model_row(job, facts, windows, losses, about, history, origin) -> Row:
    steps = [line for line in history if "validation" not in line]
    validations = [line for line in history if "validation" in line]
    trained = job.steps * job.training.batch * job.shape.length
    row = {"key": job.key, **job.row(), "data": short(facts["digest"])}
    row |= {"training_tokens": str(facts["tokens"]), "epochs": f"{trained / facts['tokens']:.3f}"}
    row |= {"steps": str(job.steps), "trained_tokens": str(trained)}
    row |= {"parameters": str(about["parameters"]), "embedding": str(about["embedding"])}
    row |= {"tokens_per_second": f"{speed(history):.0f}", "seconds": f"{trained / max(speed(history), 1e-9):.1f}"}
    row |= {"peak_gib": f"{max((line.get('peak_gib', 0.0) for line in steps), default=0.0):.2f}"}
    row |= {"training_loss": f"{steps[-1]['loss']:.4f}" if steps else ""}
    row |= {"validation_loss": f"{validations[-1]['validation']:.4f}" if validations else ""}
    for held_out, found in zip(windows, losses, strict=True):
        row |= {f"{name}_{_kind(held_out, job)}": f"{value:.5f}" for name, value in summary(found, held_out).items()}
    return row | {"lengths": " ".join(str(held_out.length) for held_out in windows), **origin}


def _kind(held_out: HeldOut, job: Job) -> str:
    return "short" if held_out.length <= job.shape.length else "long"


def _history_rows(history: Sequence[dict], job: Job) -> Iterator[Row]:
    tokens_a_step = job.training.batch * job.shape.length
    for line in history:
        row = {"step": str(line["step"]), "tokens": str(line["step"] * tokens_a_step)}
        for name, digits in (("loss", 4), ("validation", 4), ("tokens-per-second", 0), ("seconds", 2)):
            value = line.get(name)
            row[name.replace("-", "_")] = "" if value is None else f"{value:.{digits}f}"
        row["load"] = _layers(line.get("load"), lambda shares: "/".join(f"{share:.4f}" for share in shares))
        row["entropy"] = _layers(line.get("entropy"), "{:.4f}".format)
        yield row


def _layers(values: dict | None, shown) -> str:
    return " ".join(f"{layer}:{shown(value)}" for layer, value in (values or {}).items())


def speeds(history: Sequence[dict]) -> list[float]:
    """Tokens a second of the log intervals, without the first ones where there are more."""
    found = [line["tokens-per-second"] for line in history if "tokens-per-second" in line]
    return found[UNTIMED:] or found


def speed(history: Sequence[dict]) -> float:
    """Median tokens a second of a training; 0 without a log interval."""
    return statistics.median(speeds(history) or [0.0])


def shown(windows: Sequence[HeldOut], losses: Sequence[np.ndarray]) -> str:
    """A line about a measured model."""
    parts = []
    for held_out, found in zip(windows, losses, strict=True):
        values = summary(found, held_out)
        parts.append(
            f"at {held_out.length} tokens {values['bits_per_byte']:.4f} bits per byte, loss {values['loss']:.4f}, of "
            f"repeating tokens {values['repeating_loss']:.4f}, of others {values['other_loss']:.4f}"
        )
    return "; ".join(parts)
