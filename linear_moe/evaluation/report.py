"""Results of an evaluation as a table and as JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

from linear_moe.evaluation.suites import Suite
from linear_moe.temporary import replaced_file

PERCENT = ("acc", "acc_norm", "exact_match", "contains", "em", "f1")
"""Metrics that the harness gives as shares, and people read in percent."""


def rows(results: dict[str, dict]) -> list[tuple[str, str, float, float | None]]:
    """(task, metric, value, standard error) of the harness' ``results``. A standard error may be missing."""
    found = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            found.append((task, metric, float(value), float(error) if isinstance(error, (int, float)) else None))
    return found


def shown(metric: str, value: float) -> str:
    return f"{100 * value:.2f} %" if metric in PERCENT else f"{value:.4f}"


def table(results: dict[str, dict], suite: Suite | None) -> str:
    """A Markdown table; for a suite with its average, and the averages of the paper."""
    lines = ["| task | metric | value | +- |", "| --- | --- | --- | --- |"]
    found = rows(results)
    for task, metric, value, error in found:
        spread = "" if error is None or math.isnan(error) else shown(metric, error)
        lines.append(f"| {task} | {metric} | {shown(metric, value)} | {spread} |")
    if suite is None:
        return "\n".join(lines)
    counted = [value for task, metric, value, _ in found if suite.tasks.get(task) == metric]
    wanted = [task for task, metric in suite.tasks.items() if metric is not None]
    if counted and len(counted) == len(wanted):
        scale = 100 if set(suite.tasks.values()) & set(PERCENT) else 1
        lines.append(f"| average | {', '.join(wanted)} | {scale * sum(counted) / len(counted):.2f} | |")
    if suite.paper:
        lines += ["", "In the paper (arXiv 2502.13685), average:", ""]
        lines += ["| size | " + " | ".join(_models(suite)) + " |", "| --- |" + " --- |" * len(_models(suite))]
        for size, averages in suite.paper.items():
            cells = " | ".join(f"{averages[name]:.2f}" if name in averages else "" for name in _models(suite))
            lines.append(f"| {size} | {cells} |")
    if suite.note:
        lines += ["", suite.note]
    return "\n".join(lines)


def _models(suite: Suite) -> list[str]:
    return list(dict.fromkeys(name for averages in suite.paper.values() for name in averages))


def write(path: Path, content: dict) -> None:
    """Writes JSON, all of the file or nothing."""
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
