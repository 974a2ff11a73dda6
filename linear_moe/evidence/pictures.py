"""Pictures of finished models: loss by position, of repeating tokens, and along training. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from linear_moe.evidence.classes import Rows, class_means, class_names, frequency_names, is_of, lengths, title
from linear_moe.evidence.repeats import DISTANCES
from linear_moe.watching.headless_matplotlib import plt, save

COLORS = {"softmax": "0.35", "gdn": "tab:orange", "gdn-state": "tab:red", "gdn-heads": "tab:brown", "mom": "tab:blue",
          "mom-hybrid": "tab:green"}  # fmt: skip
LEGEND = {"fontsize": 8}


def draw_all(folder: Path, models: Rows, positions: Rows, repeats: Rows, history: Rows) -> list[Path]:
    """Draws every picture into a folder, and returns the paths."""
    pictures = {
        "loss_by_position.png": lambda path: draw_positions(path, models, positions),
        "repeating_tokens.png": lambda path: draw_repeats(path, models, repeats),
        "training.png": lambda path: draw_training(path, models, history),
    }
    for name, draw in pictures.items():
        draw(folder / name)
    return [folder / name for name in pictures]


def style(row, index: int) -> dict:
    return {"color": COLORS.get(row["model"], f"C{index}"), "linewidth": 2.2 if row["model"] == "mom" else 1.4}


def draw_positions(path: Path, models: Rows, positions: Rows) -> None:
    """Loss against the number of tokens read before, at the longest length."""
    longest = max(lengths(positions))
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    highest, lowest = -np.inf, np.inf
    for index, model in enumerate(models):
        rows = [row for row in positions if int(row["length"]) == longest and is_of(row, model)]
        first, end, loss = np.array([[float(row[name]) for name in ("first", "end", "loss")] for row in rows]).T
        axes.plot(np.sqrt(np.maximum(first, end / 4) * end), loss, "o-", markersize=3, label=title(model, models),
                  **style(model, index))  # fmt: skip
        trained = end <= int(model["length"])
        highest, lowest = max(highest, loss[trained].max()), min(lowest, loss.min())
    axes.axvline(int(models[0]["length"]), color="0.2", linestyle="--", linewidth=1, label="training length")
    axes.set_ylim(lowest - 0.1, highest + 0.1)  # softmax past its training length may leave the picture
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read before", ylabel="loss (nats a token)", title="Held-out text, loss by position")
    axes.grid(alpha=0.3)
    axes.legend(**LEGEND)
    save(figure, path)


def draw_repeats(path: Path, models: Rows, repeats: Rows) -> None:
    """Loss of repeating tokens by distance and by frequency, at the training length and the longest."""
    found = lengths(repeats)
    figure, panels = plt.subplots(len(found), 2, figsize=(13, 4.2 * len(found)), layout="constrained", squeeze=False)
    for row_of_panels, length in zip(panels, found, strict=True):
        kept = [row for row in repeats if int(row["length"]) == length and row["longest"] != "1"]
        for axes, column, names in zip(
            row_of_panels, ("distance", "frequency"), (class_names(DISTANCES, "<"), frequency_names()), strict=True
        ):
            classes = sorted({int(row[column]) for row in kept})
            for index, model in enumerate(models):
                means = class_means((row for row in kept if is_of(row, model)), column)
                values = [means[value][0] if value in means else np.nan for value in classes]
                axes.plot(
                    range(len(classes)), values, "o-", markersize=4, label=title(model, models), **style(model, index)
                )
            axes.set_xticks(range(len(classes)), [names[value] for value in classes], fontsize=8)
            axes.set(ylabel="loss (nats a token)", title=f"Tokens that repeat a bigram, {length} tokens of context")
            axes.grid(alpha=0.3)
        row_of_panels[0].set_xlabel("tokens since the bigram's last occurrence")
        row_of_panels[1].set_xlabel("occurrences of the bigram in the training text")
    panels[0][0].legend(**LEGEND)
    save(figure, path)


def draw_training(path: Path, models: Rows, history: Rows) -> None:
    """Validation loss against tokens and against seconds of training."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    losses = []
    for index, model in enumerate(models):
        rows = {int(row["step"]): row for row in history if is_of(row, model) and row["validation"]}
        steps = sorted(rows)[1:]  # the first validation is far above the others
        if not steps:
            continue
        tokens = np.array([int(rows[step]["tokens"]) for step in steps])
        loss = [float(rows[step]["validation"]) for step in steps]
        left.plot(tokens / 1e6, loss, label=title(model, models), **style(model, index))
        right.plot(tokens / float(model["tokens_per_second"]), loss, **style(model, index))
        losses += loss
    left.set(xlabel="training tokens (millions)", ylabel="validation loss (nats a token)", title="Equal tokens")
    right.set(xlabel="seconds of one GPU", title="Equal time")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if losses:
        left.legend(**LEGEND)
    save(figure, path)
