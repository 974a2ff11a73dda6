"""Rows of finished models by model and by class of token, for the tables and the pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from linear_moe.evidence.jobs import TITLES
from linear_moe.evidence.repeats import FREQUENCIES
from linear_moe.recall import records

Rows = list[records.Row]


def class_means(rows: Iterable[records.Row], column: str) -> dict[int, tuple[float, int]]:
    """{class: (mean loss, tokens)}."""
    sums: dict[int, list[float]] = {}
    for row in rows:
        total = sums.setdefault(int(row[column]), [0.0, 0])
        total[0] += float(row["loss"]) * int(row["tokens"])
        total[1] += int(row["tokens"])
    return {value: (total / count, int(count)) for value, (total, count) in sums.items()}


def class_names(ends: Sequence[int], word: str) -> list[str]:
    """Of the classes between ends, the last of which is open."""
    return [f"{word} {end}" for end in ends] + [f"{ends[-1]} and more"]


def frequency_names() -> list[str]:
    return ["never", *(f"{a} to {b - 1}" for a, b in zip(FREQUENCIES, FREQUENCIES[1:], strict=False)),
            f"{FREQUENCIES[-1]} and more"]  # fmt: skip


def is_of(row: records.Row, model: records.Row) -> bool:
    return row["key"] == model["key"] and row["data"] == model["data"]


def lengths(rows: Rows) -> list[int]:
    return sorted({int(row["length"]) for row in rows})


def title(row: records.Row, models: Rows) -> str:
    """A model's name; with tokens, rate or seed where rows of the name differ in them."""
    name = TITLES[row["model"]].replace("layer in N", f"layer in {row['attention_every']}")
    same = [other for other in models if other["model"] == row["model"]]
    parts = [name]
    for column, shown in (("tokens", "{:g}M tokens"), ("rate", "rate {:g}"), ("seed", "seed {:g}")):
        if len({other[column] for other in same}) > 1:
            parts.append(shown.format(float(row[column]) / (1e6 if column == "tokens" else 1)))
    return ", ".join(parts)


def comparisons(models: Rows) -> list[Rows]:
    """The rows in groups that may be compared: of one text, one shape and one batch. The largest group first."""
    shared = ("data", "layers", "hidden", "ffn", "length", "batch", "vocabulary", "precision")
    groups: dict[tuple, Rows] = {}
    for row in models:
        groups.setdefault(tuple(row[name] for name in shared), []).append(row)
    return sorted(groups.values(), key=len, reverse=True)
