"""Pictures of a run, from the TensorBoard files that Megatron and `linear_moe.watching.metrics` wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.ticker import MaxNLocator, PercentFormatter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from linear_moe.watching.headless_matplotlib import plt, save

TRAINING_LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"  # and a suffix for each of several validation sets
LOAD = re.compile(r"mom/load/layer_(\d+)/memory_(\d+)")
SMOOTHING = 0.02  # the running mean's width, as a share of the points
END = 0.05  # the share of the run that counts as the end of training
ANNOTATED_CELLS = 200  # a larger heat map has colours and no numbers

Series = dict[int, float]  # step -> value


class PlotError(ValueError):
    """The event files have nothing to draw; the message is for the user."""


def read_scalars(directory: Path) -> dict[str, Series]:
    """All scalars of a run, by name, steps in order.

    A resumed run has a file for each start. Of every scalar, a later file replaces what earlier files hold from the
    later file's first step on: those steps were run again.

    Raises PlotError when the folder does not exist or holds no event file with a scalar.
    """
    if not directory.is_dir():
        raise PlotError(f"there is no folder {directory}")
    paths = [path for path in directory.iterdir() if "tfevents" in path.name]
    if not paths:
        raise PlotError(f"{directory} holds no TensorBoard event file (events.out.tfevents.*)")
    accumulators = []
    for path in paths:
        accumulator = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        if accumulator.Tags()["scalars"]:
            accumulators.append(accumulator)
    scalars: dict[str, Series] = {}
    for accumulator in sorted(accumulators, key=lambda accumulator: accumulator.FirstEventTimestamp()):
        for name in accumulator.Tags()["scalars"]:
            new = {}
            for event in accumulator.Scalars(name):
                # At the end of training Megatron writes the test loss too under the validation loss's name and step.
                new.setdefault(event.step, event.value)
            first = min(new)
            old = scalars.get(name, {})
            scalars[name] = dict(sorted({**{s: v for s, v in old.items() if s < first}, **new}.items()))
    if not scalars:
        raise PlotError(f"the event files in {directory} hold no scalar")
    return scalars


def plot_losses(scalars: dict[str, Series], path: Path, references: Sequence[tuple[float, str]] = ()) -> None:
    """Training loss, raw and smoothed, validation losses, and horizontal lines to compare with, over the steps.

    Args:
        scalars: of `read_scalars`.
        path: of the PNG file.
        references: pairs of nats per token and a label.

    Raises PlotError when there is no training loss.
    """
    if TRAINING_LOSS not in scalars:
        raise PlotError(f"there is no scalar named '{TRAINING_LOSS}', only {_names(scalars)}")
    steps, losses = _arrays(scalars[TRAINING_LOSS])
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="training")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="training, running mean")
    colors = ["tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown"]
    names = sorted(name for name in scalars if re.fullmatch(rf"{VALIDATION_LOSS}(-\S+)?", name))
    for index, name in enumerate(names):
        label = "validation" + name.removeprefix(VALIDATION_LOSS).replace("-", " ", 1)
        points = _arrays(scalars[name])
        axes.plot(*points, "o-", color=colors[index % len(colors)], markersize=5, linewidth=1, label=label)
    for value, label in references:
        axes.axhline(value, color="0.35", linestyle="--", linewidth=1.2, label=f"{label}: {value:.2f} nats")
    axes.set(title="Language model loss", xlabel="training step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def plot_memory_load(scalars: dict[str, Series], path: Path) -> None:
    """How evenly the memories are used: each layer's shares at the end of training, and their extremes over the steps.

    Raises PlotError when no memory's load was recorded.
    """
    found = {LOAD.fullmatch(name): series for name, series in scalars.items() if LOAD.fullmatch(name)}
    if not found:
        raise PlotError(
            "there is no scalar named 'mom/load/layer_*/memory_*': the run has no Mixture-of-Memories layer"
        )
    loads = {(int(match[1]), int(match[2])): series for match, series in found.items()}
    layers = sorted({layer for layer, _ in loads})
    num_memories = 1 + max(memory for _, memory in loads)
    steps = sorted(set.intersection(*(set(series) for series in loads.values())))
    if not steps:
        raise PlotError("no step has the loads of all memories: the event files are incomplete")
    share = np.array([[[loads[layer, m][s] for m in range(num_memories)] for layer in layers] for s in steps])
    balanced = 1 / num_memories
    last = max(1, round(END * len(steps)))

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, max(4.5, 1.6 + 0.24 * len(layers))), width_ratios=(1, 1.25), layout="constrained"
    )
    figure.suptitle("Token choices per memory (the shared memory, which sees every token, is left out)")
    _draw_shares(figure, left, share[-last:].mean(0), layers, balanced)
    span = f"step {steps[-1]}" if last == 1 else f"steps {steps[-last]} to {steps[-1]}"
    left.set_title(f"Share of each memory, {span}")
    _draw_extremes(right, np.array(steps), share, balanced)
    save(figure, path)


def smooth(values: np.ndarray) -> np.ndarray:
    """Running mean over SMOOTHING of the points, centred.

    Near the ends the window has fewer points on both sides, so that a steep fall is not flattened.
    """
    half = max(1, round(SMOOTHING * len(values) / 2))
    return np.array([values[max(i - half, 0) : i + min(i, half) + 1].mean() for i in range(len(values))])


def _draw_shares(figure, axes, share: np.ndarray, layers: list[int], balanced: float) -> None:
    """share [layers, memories]: a heat map, white where balanced. The scale shows a small difference as small."""
    norm = TwoSlopeNorm(balanced, 0, max(2 * balanced, share.max()))
    picture = axes.imshow(share, cmap="RdBu_r", norm=norm, aspect="auto")
    if share.size <= ANNOTATED_CELLS:
        for (row, column), value in np.ndenumerate(share):
            color = "white" if abs(norm(value) - 0.5) > 0.35 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set(xlabel="memory", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    every = 1 if len(layers) <= 32 else 4
    axes.set_yticks(range(0, len(layers), every), layers[::every])
    bar = figure.colorbar(picture, ax=axes, format=PercentFormatter(1, decimals=0))
    bar.set_label(f"share of the layer's token choices (white: 1/{share.shape[1]})")


def _draw_extremes(axes, steps: np.ndarray, share: np.ndarray, balanced: float) -> None:
    """share [steps, layers, memories]: the most and the least used memory of every layer."""
    marker = "o" if len(steps) == 1 else None
    for extreme, name, color in ((share.max(2), "most", "tab:red"), (share.min(2), "least", "tab:blue")):
        axes.fill_between(steps, extreme.min(1), extreme.max(1), color=color, alpha=0.2, linewidth=0)
        axes.plot(steps, extreme.mean(1), marker=marker, color=color, label=f"{name} used memory, mean over layers")
    axes.axhline(balanced, color="0.2", linestyle="--", linewidth=1.2, label=f"balanced: 1/{share.shape[2]}")
    axes.set(
        title="Most and least used memory (bands: range over layers)",
        xlabel="training step",
        ylabel="share of a layer's token choices",
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()


def _arrays(series: Series) -> tuple[np.ndarray, np.ndarray]:
    return np.array(list(series)), np.array(list(series.values()))


def _names(scalars: dict[str, Series]) -> str:
    return ", ".join(f"'{name}'" for name in sorted(scalars)[:8])
