"""The table and the pictures of finished models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

from linear_moe.recall import records
from linear_moe.recall.baselines import ATTENTION, MATCHES, STATE_PER_MEMORY, Comparison, all_mixers
from linear_moe.recall.models import Mixer, count_parameters
from linear_moe.recall.runs import Plan, StepTimes, best_rates, finished_rows
from linear_moe.recall.training import Job, Settings
from linear_moe.temporary import save_figure

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402

TABLE = "table.md"
PICTURES = ("accuracy_by_pairs.png", "accuracy_by_state.png", "curves.png")
CLAIM_PAIRS = (16, 32)
LOW, HIGH = 0.5, 0.9  # the claim: one memory stays below, MoM with the same state per memory comes above
COLUMNS = 4  # of panels
MOST_NAMED = 10  # a legend names up to this many models; of more models, the kinds
KINDS = ("MoM(GDN)", "GDN", "MoM(GLA)", "GLA", "softmax", "MoM(GDN) text conv", "MoM(GLA) text conv")
Rows = dict[Job, records.Row]


def write_report(
    plan: Plan, comparisons: Sequence[Comparison], times: StepTimes, output: Path
) -> tuple[str, list[Path]]:
    """Writes the table and the pictures of the longest training of which models are finished.

    Returns the table and the paths that were written; an empty text and no path where no model is finished.
    """
    rows = records.read(output / records.RESULTS)
    settings, done = plan.settings, {}
    for steps in plan.step_counts():
        longer = finished_rows(rows, plan.with_steps(steps))
        mixers = all_mixers(comparisons)
        if longer and (not done or len(best_rates(mixers, plan, longer)) == len(mixers)):
            settings, done = plan.with_steps(steps), longer
    if not done:
        return "", []
    best = best_rates(all_mixers(comparisons), plan, done)
    parts = [heading(plan, settings, done)]
    parts += [comparison_table(c, plan, settings, done, best, times) for c in comparisons]
    parts += [claim(c, plan, done, best) for c in comparisons]
    parts += [f"{mixer.name} does not run here: {error}" for mixer, error in times.failures.items()]
    parts.append(rates_table(comparisons, done))
    text = "\n\n".join(part for part in parts if part) + "\n"
    (output / TABLE).write_text(text)
    written = [output / TABLE]
    chosen = {mixer: _seeds(mixer, plan, done, best) for mixer in all_mixers(comparisons) if mixer in best}
    if chosen:
        for name, draw in zip(PICTURES, (draw_pairs, draw_state, draw_curves), strict=True):
            draw(comparisons, chosen, output / name)
            written.append(output / name)
    return text, written


def heading(plan: Plan, settings: Settings, rows: Rows) -> str:
    """What all models share, and where the rows come from."""
    task, shape, training = settings.task, settings.shape, settings.training
    devices = sorted({f"{row['device']}, torch {row['torch']}, commit {row['commit']}" for row in rows.values()})
    tuned = "every seed" if plan.all_rates else f"seed {plan.seeds[0]}"
    return (
        f"Accuracy in percent at every number of key-value pairs: mean over the seeds, and lowest to highest. "
        f"{task.length} tokens, vocabulary {task.vocabulary}, {task.batch} sequences a step, {training.steps} steps "
        f"for every model on the same batches, {shape.layers} layers of {shape.hidden}. Rates "
        f"{', '.join(f'{rate:g}' for rate in plan.rates)} on {tuned}, the best for seeds "
        f"{', '.join(map(str, plan.seeds))}. Flat: over the last eighth of the steps before the rate falls the "
        f"accuracy gained at most 1 point. Times are of one step alone. {'; '.join(devices)}."
    )


def comparison_table(
    comparison: Comparison, plan: Plan, settings: Settings, rows: Rows, best: dict[Mixer, float], times: StepTimes
) -> str:
    """A MoM model and what its baselines reach, a line each."""
    pairs = settings.task.pairs
    head = ["equal", "model", "state a layer", "parameters", "ms a step", "rate", *map(str, pairs), "seeds", "flat"]
    lines = [_line(head), _line(["---"] * len(head))]
    named = {"": comparison.mom} | {
        name: comparison.baselines[name] for name in MATCHES.values() if name in comparison.baselines
    }
    for equal, mixer in named.items():
        if mixer not in best:
            continue
        found = _seeds(mixer, plan, rows, best)
        accuracy = np.array([list(records.pairs_of(row).values()) for row in found])  # [seeds, pairs]
        lines.append(
            _line(
                [
                    equal,
                    mixer.name,
                    mixer.state or "grows",
                    count_parameters(mixer, settings.shape, settings.task.vocabulary),
                    f"{times(mixer):.3f}",
                    f"{best[mixer]:g}",
                    *(_spread(100 * column) for column in accuracy.T),
                    len(found),
                    "yes" if all(row["flat"] == "True" for row in found) else "no",
                ]
            )
        )
    return f"### {comparison.mom.name}\n\n" + "\n".join(lines)


def claim(comparison: Comparison, plan: Plan, rows: Rows, best: dict[Mixer, float]) -> str:
    """Whether one memory stays under LOW and MoM with the same state per memory comes over HIGH, on every seed."""
    alone = comparison.baselines.get(STATE_PER_MEMORY)
    if alone not in best or comparison.mom not in best:
        return ""
    lines = []
    for pairs in CLAIM_PAIRS:
        low = [records.pairs_of(row).get(pairs) for row in _seeds(alone, plan, rows, best)]
        high = [records.pairs_of(row).get(pairs) for row in _seeds(comparison.mom, plan, rows, best)]
        if None in (*low, *high):
            continue
        holds = max(low) < LOW and min(high) > HIGH
        whole = min(len(low), len(high)) == len(plan.seeds)
        lines.append(
            f"At {pairs} pairs {alone.name} reaches at most {100 * max(low):.1f} % and {comparison.mom.name} at least "
            f"{100 * min(high):.1f} %: under {100 * LOW:.0f} % and over {100 * HIGH:.0f} % "
            f"{'hold' if holds else 'do not hold'} on {'all' if whole else 'the finished'} seeds."
        )
    return "\n".join(lines)


def rates_table(comparisons: Sequence[Comparison], rows: Rows) -> str:
    """Every trained model, a line each."""
    lines = [_line(["model", "rate", "seed", "mean %", "by pairs %", "flat"]), _line(["---"] * 6)]
    for mixer in all_mixers(comparisons):
        for job in sorted((job for job in rows if job.mixer == mixer), key=lambda job: (job.seed, job.rate)):
            row = rows[job]
            by_pairs = " ".join(f"{100 * value:.1f}" for value in records.pairs_of(row).values())
            mean = f"{100 * records.mean_accuracy(row):.1f}"
            flat = "yes" if row["flat"] == "True" else "no"
            lines.append(_line([mixer.name, f"{job.rate:g}", job.seed, mean, by_pairs, flat]))
    return "### Every model, rate and seed\n\n" + "\n".join(lines)


Chosen = dict[Mixer, list[records.Row]]


def draw_pairs(comparisons: Sequence[Comparison], chosen: Chosen, path: Path) -> None:
    """Accuracy against the number of pairs, a panel a comparison; bands from the lowest to the highest seed."""

    def draw(axes, label, mixer, color):
        accuracy = np.array([list(records.pairs_of(row).values()) for row in chosen[mixer]])
        pairs = list(records.pairs_of(chosen[mixer][0]))
        axes.plot(pairs, 100 * accuracy.mean(0), "o-", color=color, label=label, **_emphasis(mixer))
        axes.fill_between(pairs, 100 * accuracy.min(0), 100 * accuracy.max(0), color=color, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(pairs, pairs)

    _draw_panels(comparisons, chosen, path, draw, "key-value pairs")


def draw_curves(comparisons: Sequence[Comparison], chosen: Chosen, path: Path) -> None:
    """Accuracy along training at the best rate, averaged over the numbers of pairs; a line a seed."""

    def draw(axes, label, mixer, color):
        for row in chosen[mixer]:
            steps, accuracy = np.array(records.curve_of(row)).T
            axes.plot(steps, 100 * accuracy, color=color, label=label, alpha=0.8, **_emphasis(mixer))
            label = None

    _draw_panels(comparisons, chosen, path, draw, "steps")


def draw_state(comparisons: Sequence[Comparison], chosen: Chosen, path: Path) -> None:
    """Accuracy against the numbers that a layer keeps, a panel for every number of pairs; softmax is a dashed line."""
    pairs = list(records.pairs_of(next(iter(chosen.values()))[0]))
    figure, grid = plt.subplots(1, len(pairs), figsize=(3.6 * len(pairs), 5.2), squeeze=False, layout="constrained")
    few = len(chosen) <= MOST_NAMED
    for axes, count in zip(grid[0], pairs, strict=True):
        for index, (mixer, rows) in enumerate(chosen.items()):
            accuracy = 100 * np.mean([records.pairs_of(row)[count] for row in rows])
            name = mixer.name if few else _kind(mixer)
            color = f"C{index if few else KINDS.index(_kind(mixer))}"
            if mixer.state:
                marker = {"marker": "*", "markersize": 14} if mixer.memories > 1 else {"marker": "o", "markersize": 7}
                axes.plot(mixer.state, accuracy, linestyle="", color=color, label=name, alpha=0.85, **marker)
            else:
                axes.axhline(accuracy, color="0.4", linestyle="--", label=name)
        states = sorted({mixer.state for mixer in chosen if mixer.state})
        axes.set(xscale="log", ylim=(-3, 103), title=f"{count} pairs", xlabel="state a layer (numbers)")
        axes.set_xticks(states, states, rotation=60)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel("accuracy (%)")
    handles = dict(zip(*reversed(grid[0][0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=4, fontsize=8)
    _save(figure, path, "Accuracy against state: stars are MoM, dots one memory, dashed softmax attention")


def _draw_panels(comparisons, chosen, path, draw, x_label):
    columns = min(COLUMNS, len(comparisons))
    count = -(-len(comparisons) // columns)
    size = (max(8, 5.5 * columns), 5.5 * count)
    figure, grid = plt.subplots(count, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(comparisons) :]:
        axes.set_visible(False)
    for axes, comparison in zip(grid.flat, comparisons, strict=False):
        labels: dict[Mixer, list[str]] = {}
        for equal, mixer in {"": comparison.mom, **comparison.baselines}.items():
            if mixer in chosen:
                labels.setdefault(mixer, []).extend([equal] if equal and equal != ATTENTION else [])
        for index, (mixer, equal) in enumerate(labels.items()):
            label = mixer.name + (f" (equal {'; '.join(equal)})" if equal else "")
            draw(axes, label, mixer, f"C{index}")
        axes.set(ylim=(-3, 103), xlabel=x_label, ylabel="accuracy (%)", title=comparison.mom.name)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    _save(figure, path, "Multi-query associative recall")


def _kind(mixer: Mixer) -> str:
    return mixer.name.split()[0] + (" text conv" if mixer.text_conv else "")


def _emphasis(mixer: Mixer) -> dict:
    return {"linewidth": 2.6 if mixer.memories > 1 else 1.3}


def _save(figure, path: Path, title: str) -> None:
    figure.suptitle(title)
    save_figure(figure, path, dpi=120)
    plt.close(figure)


def _seeds(mixer: Mixer, plan: Plan, rows: Rows, best: dict[Mixer, float]) -> list[records.Row]:
    """The finished rows of a mixer at its best rate."""
    jobs = [Job(mixer, best[mixer], seed) for seed in plan.seeds]
    return [rows[job] for job in jobs if job in rows]


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(values: np.ndarray) -> str:
    mean = f"{values.mean():.1f}"
    return mean if len(values) == 1 else f"{mean} ({values.min():.1f} to {values.max():.1f})"
