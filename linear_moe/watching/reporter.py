"""One readable line per log interval and per validation in place of Megatron's, and the run's speed in its plots.

step   120/2000   6% | loss 3.214 | grad 0.92 | lr 2.9e-04 | 12.3k tok/s | 241 TFLOP/s 24% MFU | balance 1.02 |
memory load 18-31% | left 0:12:30
"""

from __future__ import annotations

import inspect
import math
import re
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from megatron.training import training

from linear_moe.watching.flops import device_peak_flops, flops_patch
from linear_moe.watching.metrics import memory_metrics, scalars, summarize, write
from megatron_patches.patch import Patch, apply_all, wrap

INTERVALS_FOR_TIME_LEFT = 5
# Fields of Megatron's line that ours tells in its own way, or that never change. The others are passed on.
TOLD_OTHERWISE = {
    "consumed samples", "elapsed time per iteration (ms)", "throughput per GPU (TFLOP/s/GPU)", "learning rate",
    "global batch size", "grad norm", "number of skipped iterations", "number of nan iterations",
}  # fmt: skip


@dataclass
class Interval:
    """What happened since the last line, or since the last write to the plots. Tensors stay on the device."""

    started: float = 0.0  # on the training clock, seconds
    steps: int = 0
    skipped: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # sums over the steps that were not skipped
    not_finite: torch.Tensor | int = 0
    routing: torch.Tensor | float = 0.0

    def add_step(self, losses: dict[str, torch.Tensor], skipped: bool, tokens: float, flops: float) -> None:
        self.steps += 1
        self.skipped += int(skipped)
        self.tokens += tokens
        self.flops += flops
        for name, value in losses.items():
            value = value.detach().float().sum()
            self.not_finite = self.not_finite + ~value.isfinite()
            if not skipped:
                self.losses[name] = self.losses.get(name, 0.0) + value

    def speed(self, now: float, world_size: int) -> dict[str, float]:
        """Tokens per second of the job, TFLOP/s of one device and, where its peak is known, the share of that peak."""
        seconds = max(now - self.started, 1e-9)
        flops = self.flops / seconds / world_size
        peak = device_peak_flops()
        speed = {"tokens-per-second": self.tokens / seconds, "tflops-per-device": flops / 1e12}
        return speed | ({} if peak is None else {"mfu": flops / peak})


class Console:
    """Follows a run from one call of training_log to the next."""

    def __init__(self) -> None:
        self.since_line = Interval()
        self.since_write = Interval()
        self.recent: deque[tuple[int, float]] = deque(maxlen=INTERVALS_FOR_TIME_LEFT)  # steps, seconds

    def log(self, training_log, call: dict) -> bool:
        """Calls Megatron's training_log with its arguments, then says and plots what is due at this iteration."""
        args = training.get_args()
        iteration, first = call["iteration"], call["is_first_iteration"]
        self._add_step(args, call)
        with _captured_lines() as megatron_lines:
            report_memory_flag = training_log(**call)
        says = first or iteration % args.log_interval == 0
        writes = _plots(args) and iteration % args.tensorboard_log_interval == 0
        if not (says or writes):
            return report_memory_flag

        timer = training.get_timers()("interval-time")
        if not says:  # otherwise training_log has just read it
            timer.elapsed(reset=False)
        now = timer.active_time()  # leaves out validation and checkpoints, and is never reset
        if getattr(args, "token_mixer", "attention") == "mom":
            routing = memory_metrics().collect(args.num_layers + (args.mtp_num_layers or 0), args.mom_num_memories)
            self.since_line.routing += routing
            self.since_write.routing += routing
        if says:
            self._say(args, call, now, megatron_lines)
        if writes:
            values = self.since_write.speed(now, args.world_size) | _routing_scalars(self.since_write)
            write(values, iteration, training.get_tensorboard_writer(), training.get_wandb_writer())
            self.since_write = Interval(started=now)
        return report_memory_flag

    def _add_step(self, args, call: dict) -> None:
        batch_size = (
            args.micro_batch_size
            * args.data_parallel_size
            * args.gtp_weight_remat_size
            * training.get_num_microbatches()
        )
        lengths = call["seqlen_squared_sum_in_batch"], call["total_real_tokens_in_batch"]
        tokens = batch_size * args.seq_length if lengths[1] is None else lengths[1]
        flops = training.num_floating_point_operations(args, batch_size, *lengths)
        skipped = bool(call["skipped_iter"])
        self.since_line.add_step(call["loss_dict"], skipped, tokens, flops)
        self.since_write.add_step({}, skipped, tokens, flops)  # Megatron plots the losses itself

    def _say(self, args, call: dict, now: float, megatron_lines: list[str]) -> None:
        interval, iteration = self.since_line, call["iteration"]
        if not call["is_first_iteration"]:  # that one compiles kernels and fills caches
            self.recent.append((interval.steps, now - interval.started))
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == args.world_size - 1:
            line = step_line(
                iteration=iteration,
                total=args.train_iters,
                losses=mean_losses(interval),
                skipped=interval.skipped,
                not_finite=int(interval.not_finite),
                grad_norm=call["grad_norm"],
                learning_rate=call["learning_rate"],
                speed=interval.speed(now, args.world_size),
                routing=summarize(interval.routing) if torch.is_tensor(interval.routing) else None,
                others=[text for line in megatron_lines for text in other_fields(line, set(interval.losses))],
                seconds_left=self._seconds_left(args.train_iters - iteration),
            )
            training.print_rank_last(line)
        self.since_line = Interval(started=now)

    def _seconds_left(self, steps: int) -> float | None:
        if not self.recent:
            return None
        return steps * sum(seconds for _, seconds in self.recent) / sum(count for count, _ in self.recent)


def mean_losses(interval: Interval) -> dict[str, float]:
    """Means over the steps that were not skipped; nothing when all were. Waits for the device."""
    counted = interval.steps - interval.skipped
    return {name: float(total) / counted for name, total in interval.losses.items()}


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
    """The line of a log interval; what is None, zero or empty is left out. `routing` is a report of `summarize`."""
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


def other_fields(megatron_line: str, losses: set[str]) -> list[str]:
    """Fields of Megatron's iteration line that `step_line` does not tell by itself, such as the experts' losses."""
    fields = []
    for text in megatron_line.split(" | ")[1:]:
        name, _, value = text.strip(" |").rpartition(":")
        same = name in TOLD_OTHERWISE or name in losses or (name, value.strip()) == ("loss scale", "1.0")
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
        elif name == "lm loss":  # Megatron prints one of every loss, but only this one has a perplexity
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
    """A number that Megatron prints with an exponent, without it."""
    return f"{float(value):.4g}" if re.fullmatch(r"\s*-?\d\.\d+E[+-]\d+\s*", value) else value.strip()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}"
    return f"{days}d {clock}" if days else clock


def _routing_scalars(interval: Interval) -> dict[str, float]:
    return scalars(summarize(interval.routing)) if torch.is_tensor(interval.routing) else {}


def _plots(args) -> bool:
    """Whether some process writes plots: the same answer in all of them, for collecting metrics takes them all."""
    return bool(getattr(args, "tensorboard_dir", None) or getattr(args, "wandb_project", None))


_console = Console()
_captured: list[str] | None = None


@contextmanager
def _captured_lines():
    """Keeps Megatron's iteration line from the screen, and yields a list that receives it."""
    global _captured
    _captured = lines = []
    try:
        yield lines
    finally:
        _captured = None


def _log(training_log, *args, **kwargs) -> bool:
    global _console
    call = inspect.signature(training_log).bind(*args, **kwargs)
    call.apply_defaults()
    if call.arguments["is_first_iteration"]:
        _console = Console()
    return _console.log(training_log, call.arguments)


def _print(print_rank_last, message) -> None:
    text = str(message)
    if _captured is not None and re.match(r" \[[^]]*\] iteration +\d+/", text):
        _captured.append(text)
    elif text.startswith("---") and not text.strip("-"):
        return  # the rules around a validation line
    else:
        print_rank_last(validation_line(text) or message)


console_patch = Patch(
    name="console",
    reason="Megatron's iteration line is too long to read, and has no place for the memories or the time left",
    removed_when="megatron.training lets a callback print and plot",
    targets=(
        wrap("megatron.training.training", "training_log", _log),
        wrap("megatron.training.training", "print_rank_last", _print),
    ),
)


def install() -> None:
    """Counts MoM layers in FLOPs and takes over Megatron's console lines. May be called more than once."""
    apply_all((flops_patch, console_patch))
