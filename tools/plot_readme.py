"""Draws the README's two pictures from the figures in tools/measured.

    python tools/plot_readme.py

Writes training_speed.svg (h200_layers.csv, h200_lengths.csv) and decoding_memory.svg (h200_decode.csv).
A picture compares rows of one commit: the newest commit of the file that has rows of this layer and of its peer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from measured_rows import read_rows, rows_of_last_commit, source

from linear_moe.watching.headless_matplotlib import plt

PICTURES = Path(__file__).parents[1] / "docs/pictures"
OURS, PEER, SOFTMAX = "#1f5fa8", "#c2571a", "#7a7a7a"

Series = dict[int, float]


def training_speed() -> tuple[dict[str, Series], str]:
    """Tokens a second of one layer's forward and backward pass over the length of a single sequence, for each kind of
    layer, and where the figures come from.
    """
    lengths = rows_of_last_commit("h200_lengths.csv", "layer", {"mom", "softmax"})
    peers = rows_of_last_commit("h200_layers.csv", "layer", {"mom", "fla-mom"})
    speeds: dict[str, Series] = {"mom": {}, "softmax": {}, "fla-mom": {}}
    for row in [*lengths, *(row for row in peers if row["layer"] == "fla-mom")]:
        if row["batch"] == "1" and row["hidden"] == "1024":
            tokens = int(row["tokens"])
            speeds[row["layer"]][tokens] = 1e3 * tokens / float(row["both_ms"])
    return {name: dict(sorted(series.items())) for name, series in speeds.items()}, source(lengths + peers)


def decoding_memory() -> tuple[dict[str, Series], str]:
    """Bytes that a model keeps for one sequence over the tokens of context, and where the figures come from.

    The sizes follow from the models' shapes, so rows of several commits agree.
    """
    rows = [row for row in read_rows("h200_decode.csv") if row["what"].endswith("-model") and row["batch"] == "1"]
    kept: dict[str, Series] = {"mom-model": {}, "softmax-model": {}}
    for row in rows:
        kept[row["what"]][int(row["context"])] = float(row["state_bytes_per_sequence"])
    return {name: dict(sorted(series.items())) for name, series in kept.items()}, source(rows)


def draw(
    title: str, xlabel: str, ylabel: str, source: str, path: Path, curves: list[tuple[Series, str, str, str]],
    legend_top: float | None = None,
) -> None:  # fmt: skip
    """Draws curves of (series, label, colour, marker), and saves them as a picture that does not depend on the date.

    legend_top: height of the legend's upper edge on the right, as a share of the axes; on the upper left if absent.
    """
    with plt.rc_context({"svg.hashsalt": "linear-moe", "font.size": 12}):
        figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
        for series, label, color, marker in curves:
            points = list(series), list(series.values())
            axes.plot(*points, marker, color=color, label=label, linewidth=2.5, markersize=8)
        ticks = sorted({tokens for series, *_ in curves for tokens in series})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [f"{tokens // 1024}k" for tokens in ticks])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.grid(alpha=0.3)
        corner = "upper right" if legend_top else "upper left"
        axes.legend(frameon=False, loc=corner, bbox_to_anchor=(0, 0, 1, legend_top or 1))
        axes.text(1, -0.21, source, transform=axes.transAxes, ha="right", fontsize=8, color="0.4")
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
        plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder for the pictures [docs/pictures]")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    speeds, where = training_speed()
    millions = {name: {tokens: speed / 1e6 for tokens, speed in series.items()} for name, series in speeds.items()}
    length = max(speeds["fla-mom"].keys() & speeds["mom"].keys())
    ratio = speeds["mom"][length] / speeds["fla-mom"][length]
    draw(
        f"Training: {ratio:.1f} times FLA's MoM at {length // 1024}k, and steady at every length",
        "tokens of one sequence",
        "million tokens a second", f"forward and backward pass of one layer, hidden size 1024, bf16; {where}",
        args.output / "training_speed.svg",
        [(millions["mom"], "this MoM layer", OURS, "o-"),
         (millions["softmax"], "softmax attention (PyTorch)", SOFTMAX, "s-"),
         (millions["fla-mom"], "MoM layer of flash-linear-attention (FLA) 0.6.0", PEER, "D-")],
        legend_top=0.82,
    )  # fmt: skip
    kept, where = decoding_memory()
    gigabytes = {name: {tokens: size / 1e9 for tokens, size in series.items()} for name, series in kept.items()}
    (constant,) = set(gigabytes["mom-model"].values())
    draw(
        "Memory while decoding does not grow with the context", "tokens of context", "gigabytes kept for a sequence",
        f"24 layers, hidden size 1024, bf16; {where}", args.output / "decoding_memory.svg",
        [(gigabytes["softmax-model"], "softmax attention", SOFTMAX, "s-"),
         (gigabytes["mom-model"], f"Mixture of Memories: {constant:.2f} GB at every length", OURS, "o-")],
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
