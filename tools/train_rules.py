#!/usr/bin/env python
"""Trains the demo's model with every update rule, as memories and alone, and draws the losses.

    python tools/train_rules.py [--rules gla gated_deltanet] [--steps 100] [--output runs/rules]
        [--csv FILE] [--plot FILE]

Every run has the same data, in the same order, and the same seed. A loss that is not finite, or that has not fallen by
one nat, makes the exit status 1. A row of the CSV file is one point of one curve; what a file holds already is not
trained again, so that a stopped command goes on.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from benchmark import append_csv, versions
from measured_rows import Row

from linear_moe.commands import demo
from linear_moe.commands.values import path, whole
from linear_moe.watching.run_plots import TRAINING_LOSS, read_scalars
from mom_layers import get_rule, rule_names

HOW = ("memories", "alone")
FALL = 1.0  # nats that the mean of the last ten steps' losses must lie below the first


def words(rule: str, how: str) -> list[str]:
    """The demo's model with a rule: four memories and a shared one, or one memory without a router. A rule whose
    kernels do not take the demo's head size has more heads of the largest size, together as wide."""
    model = list(demo.MODEL)
    heads, size = (model.index(option) + 1 for option in ("--mom-num-heads", "--mom-head-dim"))
    sizes = set(get_rule(rule).kernel_sizes(of_keys=True)) & set(get_rule(rule).kernel_sizes(of_keys=False))
    if int(model[size]) not in sizes:
        width = int(model[heads]) * int(model[size])
        model[heads], model[size] = width // max(sizes), max(sizes)
    if how == "memories":
        return [*model, "--mom-rule", rule]
    for option, values in (("--mom-num-memories", 1), ("--mom-topk", 1), ("--mom-shared-memory", 0)):
        at = model.index(option)
        del model[at : at + 1 + values]
    model[model.index("--token-mixer") + 1] = rule
    return model


def train(rule: str, how: str, folder: Path, steps: int) -> dict[int, float]:
    """The loss of every step."""
    corpus, run = folder / "corpus", folder / f"{rule}-{how}"
    shutil.rmtree(run, ignore_errors=True)
    command = [
        "-m", "linear_moe.pretrain", *words(rule, how), *demo.TRAINING, "--train-iters", steps,
        "--micro-batch-size", demo.SEQUENCES, "--global-batch-size", demo.SEQUENCES, "--eval-iters", 0,
        "--log-interval", 1, "--tensorboard-log-interval", 1, "--save-interval", 10 * steps,
        "--tensorboard-dir", run, "--log-file", folder / f"{rule}-{how}.txt", *demo.data_options(folder, corpus),
    ]  # fmt: skip
    demo.run_to_end(*command)
    return read_scalars(run)[TRAINING_LOSS]


def rows_of(file: Path | None) -> list[Row]:
    if file is None or not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def curves(rows: list[Row]) -> dict[tuple[str, str], dict[int, float]]:
    """(rule, how) -> step -> loss."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["rule"], row["layers"]), {})[int(row["step"])] = float(row["loss"])
    return found


def problem(losses: dict[int, float]) -> str | None:
    """What is wrong with a curve, in words."""
    values = [losses[step] for step in sorted(losses)]
    if not all(map(math.isfinite, values)):
        return "is not finite"
    fallen = values[0] - sum(values[-10:]) / len(values[-10:])
    return None if fallen >= FALL else f"has fallen by {fallen:.2f} nats only"


def draw(found: dict[tuple[str, str], dict[int, float]], picture: Path) -> None:
    """The curves of the rules, as memories and alone beside each other."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    rules = sorted({rule for rule, _ in found})
    for axes, how in zip(panels, HOW, strict=True):
        for number, rule in enumerate(rules):
            losses = found.get((rule, how), {})
            style = "-" if number < 10 else "--"
            axes.plot(losses.keys(), losses.values(), style, color=f"C{number % 10}", linewidth=1.4, label=rule)
        title = "four memories, top-2, and a shared one" if how == "memories" else "one memory alone"
        axes.set(title=title, xlabel="training step")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[1].legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def parse_arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", nargs="+", choices=rule_names(), default=rule_names(), metavar="RULE")
    parser.add_argument("--steps", type=whole(20), default=100, help="of a run [%(default)s]")
    parser.add_argument("--output", type=path, default=Path("runs/rules"), metavar="DIR", help="folder [%(default)s]")
    parser.add_argument("--csv", type=path, metavar="FILE", help="add the points to this file")
    parser.add_argument("--plot", type=path, metavar="FILE", help="draw all points of --csv in this file")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_arguments(argv)
    rows = rows_of(args.csv)
    demo.write_corpus(args.output)
    for rule in args.rules:
        for how in HOW:
            if (rule, how) in curves(rows):
                continue
            about = {key: value for key, value in versions().items() if key != "triton"}
            losses = train(rule, how, args.output, args.steps)
            new = [
                about | {"rule": rule, "layers": how, "step": str(step), "loss": f"{loss:.5f}"}
                for step, loss in losses.items()
            ]
            rows += new
            if args.csv:
                append_csv(args.csv, new)
    found, status = curves(rows), 0
    for rule in args.rules:
        for how in HOW:
            losses = found[rule, how]
            wrong = problem(losses)
            first, last = losses[min(losses)], losses[max(losses)]
            print(f"{rule:18s} {how:9s} {first:.3f} to {last:.3f}" + (f"  the loss {wrong}" if wrong else ""))
            status |= int(wrong is not None)
    if args.plot:
        draw(found, args.plot)
    return status


if __name__ == "__main__":
    sys.exit(main())
