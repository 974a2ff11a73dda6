"""Tables and pictures of finished models, from their rows alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from linear_moe.evidence import tables
from linear_moe.evidence.classes import (
    Rows,
    class_means,
    class_names,
    comparisons,
    frequency_names,
    is_of,
    lengths,
    title,
)
from linear_moe.evidence.repeats import DISTANCES
from linear_moe.recall import records

TABLE = "table.md"


def write_report(
    folder: Path, say: Callable[[str], None], pictures_folder: Path | None = None
) -> tuple[str, list[Path]]:
    """Writes the tables, and the pictures where matplotlib is installed. Returns the text and the paths written."""
    models = records.read(folder / tables.MODELS)
    if not models:
        return "", []
    repeats = records.read(folder / tables.REPEATS)
    positions = records.read(folder / tables.POSITIONS)
    parts = []
    for group in comparisons(models):
        parts += [heading(group), models_table(group), repeats_table(group, repeats), positions_table(group, positions)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / TABLE).write_text(text)
    written = [folder / TABLE]
    try:
        from linear_moe.evidence import memory_pictures, pictures
    except ImportError as error:
        say(f"no pictures: {error}; the same command draws them from the rows where matplotlib is installed")
        return text, written
    history = records.read(folder / tables.HISTORIES)
    place, group = pictures_folder or folder, comparisons(models)[0]
    written += pictures.draw_all(place, group, positions, repeats, history)
    return text, written + memory_pictures.draw_all(folder, group, history, place)


def heading(models: Rows) -> str:
    """What the models share, and where the rows come from."""
    settings = sorted({
        f"{row['layers']} layers of {row['hidden']}, SwiGLU {row['ffn']}, {row['length']} tokens a sequence, "
        f"{row['batch']} sequences a step, {row['precision']}" for row in models
    })  # fmt: skip
    trained = sorted({
        f"{int(row['trained_tokens']) / 1e6:.4g}M tokens ({row['epochs']} epochs of "
        f"{int(row['training_tokens']) / 1e6:.4g}M, text {row['data']})" for row in models
    })  # fmt: skip
    rates = sorted({f"rate {row['rate']}, seed {row['seed']}" for row in models})
    devices = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}" for row in models})
    return "\n".join(
        "; ".join(part) + "." for part in (settings, [f"Trained on {part}" for part in trained], rates, devices)
    )


def models_table(models: Rows) -> str:
    """A model a line. Losses are nats a token of held-out text at the training length."""
    head = ["model", "state a layer", "parameters", "without embedding", "tokens/s", "seconds", "peak GiB",
            "bits per byte", "loss", "of repeating tokens", "of others", "bits per byte, longest"]  # fmt: skip
    lines = [line(head), line(["---"] * len(head))]
    for row in models:
        parameters, embedding = int(row["parameters"]), int(row["embedding"])
        cells = [title(row, models), row["state"] if row["state"] != "0" else "grows"]
        cells += [f"{count / 1e6:.1f}M" for count in (parameters, parameters - embedding)]
        gpus = "" if row.get("gpus", "1") == "1" else f" on {row['gpus']} GPUs"
        cells += [f"{float(row['tokens_per_second']):,.0f}{gpus}", f"{float(row['seconds']):.0f}", row["peak_gib"]]
        names = ("bits_per_byte_short", "loss_short", "repeating_loss_short", "other_loss_short", "bits_per_byte_long")
        cells += [f"{float(row[name]):.4f}" if row.get(name) else "" for name in names]
        lines.append(line(cells))
    share = 100 * float(models[-1]["repeating_share_short"])
    lines += ["", f"Repeating tokens end a bigram that occurred earlier in the context: {share:.1f} % of all."]
    return "\n".join(lines)


def repeats_table(models: Rows, repeats: Rows) -> str:
    """Losses of repeating tokens by distance, by the bigram's occurrences in training, and by the n-gram's length."""
    parts = []
    for length in lengths(repeats):
        cells = [row for row in repeats if int(row["length"]) == length]
        again = [row for row in cells if row["longest"] != "1"]
        for what, column, kept, names in (
            ("tokens since the bigram's last occurrence", "distance", again, class_names(DISTANCES, "under")),
            ("occurrences of the bigram in the training text", "frequency", again, frequency_names()),
            ("longest n-gram that occurred before, 1 for none", "longest", cells, None),
        ):
            classes = sorted({int(row[column]) for row in kept})
            head = ["model", *(names[value] if names else value for value in classes)]
            lines = [f"At {length} tokens, loss by {what}:", "", line(head), line(["---"] * len(head))]
            for model in models:
                means = class_means((row for row in kept if is_of(row, model)), column)
                lines.append(line([title(model, models), *(shown(means.get(value)) for value in classes)]))
            counts = class_means((row for row in kept if is_of(row, models[0])), column)
            lines.append(line(["tokens", *(f"{counts[value][1]:,}" if value in counts else "" for value in classes)]))
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def positions_table(models: Rows, positions: Rows) -> str:
    """Loss by position at the longest length, in octaves."""
    longest = max(lengths(positions), default=0)
    ends = sorted({int(row["end"]) for row in positions if int(row["length"]) == longest})
    ends = [end for end in ends if end & (end - 1) == 0 or end == ends[-1]]
    head = ["model", *(f"to {end}" for end in ends)]
    lines = [f"Loss by position, windows of {longest} tokens:", "", line(head), line(["---"] * len(head))]
    for model in models:
        found = [row for row in positions if int(row["length"]) == longest and is_of(row, model)]
        cells = []
        for first, end in zip([0, *ends], ends, strict=False):
            inside = [row for row in found if first <= int(row["first"]) and int(row["end"]) <= end]
            widths = [int(row["end"]) - int(row["first"]) for row in inside]
            cells.append(f"{np.average([float(row['loss']) for row in inside], weights=widths):.4f}" if inside else "")
        lines.append(line([title(model, models), *cells]))
    return "\n".join(lines)


def line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def shown(value: tuple[float, int] | None) -> str:
    return "" if value is None else f"{value[0]:.4f}"
