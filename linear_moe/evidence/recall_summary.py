"""The table and the picture of the associative recall experiment, from the rows of all its runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from linear_moe.recall import records
from linear_moe.recall.models import Mixer

OF_A_MODEL = {"model", "rule", "heads", "key_size", "value_size", "memories", "topk", "shared", "text_conv", "rate",
              "seed", "state", "parameters", "accuracy", "loss", "flat", "curve", "seconds", "group",
              *records.ORIGIN}  # fmt: skip
"""Columns in which rows of one comparison may differ."""
CLAIM_PAIRS = (16, 32)
LOW, HIGH = 0.5, 0.9  # the claim: one memory stays under LOW, MoM with the same state per memory comes over HIGH
Row = records.Row


@dataclass(frozen=True)
class Trained:
    """The rows of a mixer at its best rate, and all rates that were tried.

    Attributes:
        rows: of the seeds, at the rate that did best on the first seed.
        tried: rates.
    """

    mixer: Mixer
    rows: tuple[Row, ...]
    tried: tuple[str, ...]

    def accuracy(self, pairs: int) -> np.ndarray:
        """[seeds] share of the queries named right at a number of pairs."""
        return np.array([records.pairs_of(row)[pairs] for row in self.rows])

    @property
    def is_flat(self) -> bool:
        return all(row["flat"] == "True" for row in self.rows)


def comparisons(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows in groups of one task, shape and training. The group with the most steps first, then the largest."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        key = tuple(sorted((name, value) for name, value in row.items() if name not in OF_A_MODEL))
        groups.setdefault(key, []).append(row)
    return sorted(groups.values(), key=lambda group: (-int(group[0]["steps"]), -len(group)))


def trained(rows: Sequence[Row]) -> list[Trained]:
    """Every mixer of a comparison, by its state in all. A mixer's best rate is that of its first seed."""
    found: dict[Mixer, list[Row]] = {}
    for row in rows:
        found.setdefault(records.mixer_of(row), []).append(row)
    result = []
    for mixer, own in found.items():
        first = min(int(row["seed"]) for row in own)
        tried = [row for row in own if int(row["seed"]) == first]
        best = max(tried, key=records.mean_accuracy)["rate"]
        seeds = {row["seed"]: row for row in own if row["rate"] == best}
        rates = tuple(sorted({row["rate"] for row in tried}, key=float))
        result.append(Trained(mixer, tuple(seeds[seed] for seed in sorted(seeds, key=int)), rates))
    return sorted(result, key=lambda item: (item.mixer.state, item.mixer.memories, item.mixer.name))


def table(rows: Sequence[Row]) -> str:
    """A mixer a line: mean over the seeds in percent, with the lowest and the highest."""
    models, first = trained(rows), rows[0]
    pairs = list(records.pairs_of(first))
    tuned = sorted({" ".join(model.tried) for model in models})
    lines = [
        f"{first['length']} tokens, vocabulary {first['vocabulary']}, {first['batch']} sequences a step, "
        f"{first['steps']} steps on the same batches for every model, {first['layers']} layers of {first['hidden']}, "
        f"balancing {first['balancing']}. Every model tried the rates {' / '.join(tuned)} on the first seed; the best "
        "is shown. In percent: mean over the seeds (lowest to highest).",
        "",
        _line(["model", "state of a memory", "state in all", "parameters", "rate", *map(str, pairs), "seeds", "flat"]),
        _line(["---"] * (7 + len(pairs))),
    ]
    for model in models:
        mixer, row = model.mixer, model.rows[0]
        each = mixer.state // mixer.all_memories if mixer.state else "grows"
        cells = [mixer.name, each, mixer.state or "grows", row["parameters"], row["rate"]]
        cells += [_spread(100 * model.accuracy(count)) for count in pairs]
        lines.append(_line([*cells, len(model.rows), "yes" if model.is_flat else "no"]))
    return "\n".join([*lines, "", *claims(models)])


def claims(models: Sequence[Trained]) -> list[str]:
    """Every MoM model beside one memory with its state per memory, and beside one memory with its state in all."""
    lines = []
    for model in models:
        mixer = model.mixer
        if mixer.memories == 1:
            continue
        single = [other for other in models if other.mixer.memories == 1 and other.mixer.rule == mixer.rule]
        equal = {
            "state of a memory": [other for other in single if other.mixer.state * mixer.all_memories == mixer.state],
            "state in all": [other for other in single if other.mixer.state == mixer.state],
        }
        for what, others in equal.items():
            for other in others:
                cells = [_beside(model, other, pairs) for pairs in CLAIM_PAIRS]
                lines.append(_line([mixer.name, other.mixer.name, what, *cells]))
    if not lines:
        return []
    head = ["MoM", "beside", "equal", *(f"{pairs} pairs" for pairs in CLAIM_PAIRS)]
    claim = (
        f'"Holds" means that on every seed MoM recalls over {100 * HIGH:.0f} %, and the model beside MoM under '
        f"{100 * LOW:.0f} %."
    )
    return [claim, "", _line(head), _line(["---"] * len(head)), *lines]


def _beside(model: Trained, other: Trained, pairs: int) -> str:
    if pairs not in records.pairs_of(model.rows[0]):
        return ""
    ours, theirs = model.accuracy(pairs), other.accuracy(pairs)
    holds = theirs.max() < LOW and ours.min() > HIGH
    return f"{_spread(100 * ours)}, other {_spread(100 * theirs)}: {'holds' if holds else 'does not hold'}"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Accuracy at the numbers of pairs of the claim against the state in all; a dot is a seed, a line joins means."""
    from linear_moe.watching.headless_matplotlib import plt, save

    models = [model for model in trained(rows) if model.mixer.state]
    pairs = [count for count in CLAIM_PAIRS if count in records.pairs_of(rows[0])] or list(records.pairs_of(rows[0]))
    figure, panels = plt.subplots(1, len(pairs), figsize=(6.5 * len(pairs), 5), sharey=True, layout="constrained")
    for axes, count in zip(np.atleast_1d(panels), pairs, strict=True):
        for index, model in enumerate(models):
            values = 100 * model.accuracy(count)
            marker = "o" if model.mixer.memories > 1 else "s"
            axes.plot([model.mixer.state] * len(values), values, marker, color=f"C{index}", alpha=0.35)
            axes.plot(
                model.mixer.state, values.mean(), marker, color=f"C{index}", markersize=11, label=model.mixer.name
            )
        axes.set_xscale("log", base=2)
        axes.set(xlabel="numbers in the states of a layer", ylim=(-3, 103), title=f"{count} key-value pairs")
        axes.grid(alpha=0.3)
    np.atleast_1d(panels)[0].set_ylabel("accuracy, % (small: a seed; large: the mean)")
    np.atleast_1d(panels)[-1].legend(fontsize=7, loc="lower right")
    figure.suptitle("Multi-query associative recall")
    save(figure, path)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(values: np.ndarray) -> str:
    mean = f"{values.mean():.0f}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.0f} to {values.max():.0f})"
