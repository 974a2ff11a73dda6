"""The text of console lines: of a log interval, of the memories, of a validation."""

from __future__ import annotations

import math
import re

# Fields of Megatron's line that our line has in another form, or that never change.
IN_OUR_LINE = {
    "consumed samples", "elapsed time per iteration (ms)", "throughput per GPU (TFLOP/s/GPU)", "learning rate",
    "global batch size", "grad norm", "number of skipped iterations", "number of nan iterations",
}  # fmt: skip


def step_line(
    *,
    iteration: int,
    total: int,
    losses: dict[str, float],
    skipped: int,
    not_finite: int,
    grad_norm: float | None,
    learning_rate: float | None,
    speed: dict[str, float],
    routing: dict | None,
    others: list[str],
    seconds_left: float | None,
) -> str:
    """The line of a log interval. Parts that are None, zero or empty are left out. routing: a report of `summarize`."""
    parts = [f"step {iteration:{len(str(total)) + 1}d}/{total} {100 * iteration // total:3d}%"]
    parts += [f"{'loss' if name == 'lm loss' else name} {value:.3f}" for name, value in losses.items()]
    if not losses and skipped:
        parts.append("no loss: every step was skipped")
    elif skipped:
        parts.append(f"{skipped} skipped")
    if not_finite:
        parts.append(f"{not_finite} with NaN or infinite loss")
    if grad_norm is not None:
        parts.append(f"grad {float(grad_norm):.2f}")
    if learning_rate is not None:
        parts.append(f"lr {learning_rate:.1e}")
    parts.append(f"{_short(speed['tokens-per-second'])} tok/s")
    mfu = f" {100 * speed['mfu']:.0f}% MFU" if "mfu" in speed else ""
    tflops = speed["tflops-per-device"]
    rate = f"{_three_digits(tflops)} TFLOP/s" if tflops >= 1 else f"{_three_digits(1e3 * tflops)} GFLOP/s"
    parts.append(rate + mfu)
    if routing is not None and routing["load_balancing_loss"] is not None:
        parts.append(f"balance {routing['load_balancing_loss']:.2f}")
    if routing is not None and routing["load"]:
        parts.append(f"memory load {100 * routing['load_min']:.0f}-{100 * routing['load_max']:.0f}%")
    parts += others
    if seconds_left is not None:
        parts.append(f"left {_duration(seconds_left)}")
    return " | ".join(parts)


def memory_line(iteration: int, report: dict) -> str:
    """A report of `summarize` in one line."""
    parts = [f" memories at iteration {iteration}"]
    if report["load"]:
        parts.append(f"load {100 * report['load_min']:.0f}-{100 * report['load_max']:.0f}%")
    if report["load_balancing_loss"] is not None:
        parts.append(f"balance {report['load_balancing_loss']:.2f}")
    if report["z_loss"] is not None:
        parts.append(f"z-loss {report['z_loss']:.3f}")
    return " | ".join(parts)


def other_fields(megatron_line: str, losses: set[str]) -> list[str]:
    """Fields of Megatron's iteration line that `step_line` has no part for, such as the experts' losses."""
    fields = []
    for text in megatron_line.split(" | ")[1:]:
        name, _, value = text.strip(" |").rpartition(":")
        same = name in IN_OUR_LINE or name in losses or (name, value.strip()) == ("loss scale", "1.0")
        if name and not same:
            fields.append(f"{name} {_plain(value)}")
    return fields


def validation_line(megatron_line: str) -> str | None:
    """Megatron's validation line as 'validation at step 200: loss 2.910, perplexity 18.4'; None for other lines."""
    match = re.fullmatch(r" validation(\S*) loss at iteration (\d+)(?: on (\w+) set)? \| (.+) \| ", megatron_line)
    if match is None:
        return None
    suffix, iteration, data_set, values = match.groups()
    parts = []
    for name, kind, value in re.findall(r"([^|]+) (value|PPL): (\S+)", values):
        name = name.strip()
        if kind == "value":
            parts.append(f"{'loss' if name == 'lm loss' else name} {float(value):.3f}")
        elif name == "lm loss":  # Megatron prints a perplexity for every loss, and only the language model's has one
            parts.append(f"perplexity {_three_digits(float(value))}")
    where = "test" if data_set == "test" else "validation"
    return f"{where}{suffix.replace('-', ' ', 1)} at step {iteration}: {', '.join(parts)}"


def _short(value: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{_three_digits(value / limit)}{unit}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    if not math.isfinite(value):
        return str(value)
    decimals = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{decimals}f}"


def _plain(value: str) -> str:
    """A number that Megatron prints with an exponent, in plain digits."""
    return f"{float(value):.4g}" if re.fullmatch(r"\s*-?\d\.\d+E[+-]\d+\s*", value) else value.strip()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{days}d {clock}" if days else clock
