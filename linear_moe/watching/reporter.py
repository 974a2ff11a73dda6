"""Reports a training run on the console and in its plots, in one of two styles.

`WholeLineReporter`, for `linear_moe.pretrain`, prints one line in place of Megatron's, and plots the run's speed:

    step   120/2000   6% | loss 3.214 | grad 0.92 | lr 2.9e-04 | 12.3k tok/s | 241 TFLOP/s 24% MFU | balance 1.02 |
    memory load 18-31% | left 0:12:30

`AddedLineReporter`, for other scripts, leaves Megatron's lines as they are and adds a line about the memories:

     memories at iteration 120 | load 18-31% | balance 1.02
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from megatron.training import training

from linear_moe.config import has_router
from linear_moe.watching.flops import FLOPS_TARGET, device_peak_flops
from linear_moe.watching.lines import memory_line, other_fields, step_line, validation_line
from linear_moe.watching.metrics import memory_metrics, scalars, summarize, write, write_layout
from megatron_patches.patch import Patch, wrap

INTERVALS_FOR_TIME_LEFT = 5


@dataclass
class Interval:
    """Sums over the steps since the last line, or since the last write to the plots. Tensors stay on the device."""

    started: float = 0.0  # on the training clock, seconds
    steps: int = 0
    skipped: int = 0
    tokens: float = 0.0
    flops: float = 0.0
    losses: dict[str, torch.Tensor] = field(default_factory=dict)  # sums over the steps that were not skipped
    not_finite: torch.Tensor | int = 0
    routing: torch.Tensor | None = None  # of `MemoryMetrics.collect`

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

    def add_routing(self, routing: torch.Tensor) -> None:
        self.routing = routing if self.routing is None else self.routing + routing

    def routing_report(self) -> dict | None:
        """`summarize` of the interval's routing; None for a model without memories."""
        return None if self.routing is None else summarize(self.routing)

    def mean_losses(self) -> dict[str, float]:
        """Means over the steps that were not skipped; empty when every step was skipped. Waits for the device."""
        counted = self.steps - self.skipped
        return {name: float(total) / counted for name, total in self.losses.items()}

    def speed(self, now: float, world_size: int) -> dict[str, float]:
        """Tokens per second of the job, TFLOP/s of one device and, where its peak is known, the share of that peak."""
        seconds = max(now - self.started, 1e-9)
        flops = self.flops / seconds / world_size
        peak = device_peak_flops()
        speed = {"tokens-per-second": self.tokens / seconds, "tflops-per-device": flops / 1e12}
        return speed | ({} if peak is None else {"mfu": flops / peak})


class Reporter:
    """Follows a run from one call of Megatron's training_log to the next. Lives as long as its patch is applied.

    A style overrides `due`, `print_line` and, where Megatron's own lines change, the methods around training_log.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Forgets an earlier run."""
        self.since_line = Interval()
        self.since_write = Interval()
        self._has_layout = False

    def patch(self) -> Patch:
        """The patch that lets this reporter follow a run."""
        raise NotImplementedError

    def log(self, training_log, *args, **kwargs) -> bool:
        """Calls Megatron's training_log, then prints and plots what is due at this iteration."""
        bound = inspect.signature(training_log).bind(*args, **kwargs)
        bound.apply_defaults()
        call, settings = bound.arguments, training.get_args()
        self.before_training_log(settings, call)
        report_memory_flag = self.run_training_log(training_log, *args, **kwargs)
        prints, plots = self.due(settings, call)
        if not (prints or plots):
            return report_memory_flag
        now = self.training_seconds(just_read=prints)
        if has_router(settings):
            layers = settings.num_layers + (settings.mtp_num_layers or 0)
            routing = memory_metrics().collect(layers, settings.mom_num_memories)
            self.since_line.add_routing(routing)
            self.since_write.add_routing(routing)
        if prints:
            self.print_line(settings, call, now)
            self.since_line = Interval(started=now)
        if plots:
            values, writer = self.plot_values(settings, now), training.get_tensorboard_writer()
            report = self.since_write.routing_report()
            if writer is not None and report is not None and report["load"] and not self._has_layout:
                write_layout(report["load"], writer)
                self._has_layout = True
            write(values, call["iteration"], writer, training.get_wandb_writer())
            self.since_write = Interval(started=now)
        return report_memory_flag

    def before_training_log(self, settings, call: dict) -> None:
        """Adds up what a step brings, from the run's arguments and the arguments of training_log."""

    def run_training_log(self, training_log, *args, **kwargs) -> bool:
        return training_log(*args, **kwargs)

    def training_seconds(self, just_read: bool) -> float:
        """Seconds on the training clock; `just_read`: training_log has read the clock at this iteration."""
        return 0.0

    def due(self, settings, call: dict) -> tuple[bool, bool]:
        """Whether to print, and whether to plot: the same in every process, because `collect` needs all of them."""
        raise NotImplementedError

    def print_line(self, settings, call: dict, now: float) -> None:
        """Prints the interval since the last line."""
        raise NotImplementedError

    def plot_values(self, settings, now: float) -> dict[str, float]:
        """Values of the interval since the last write, by the names of their plots."""
        report = self.since_write.routing_report()
        return {} if report is None else scalars(report)


class AddedLineReporter(Reporter):
    """Leaves Megatron's lines as they are, and adds a line and plots about the memories at every log interval."""

    def patch(self) -> Patch:
        return Patch(
            name="training-log",
            reason="Megatron's log has no place for the memories' load, and counts a MoM layer as softmax attention in "
            "FLOPs",
            removed_when="megatron.training lets a callback log, and num_floating_point_operations asks the layers",
            targets=(FLOPS_TARGET, wrap("megatron.training.training", "training_log", self.log)),
        )

    def due(self, settings, call: dict) -> tuple[bool, bool]:
        due = has_router(settings) and call["iteration"] % settings.log_interval == 0
        return due, due

    def print_line(self, settings, call: dict, now: float) -> None:
        training.print_rank_last(memory_line(call["iteration"], self.since_line.routing_report()))


class WholeLineReporter(Reporter):
    """Prints a line of ours in place of Megatron's at every log interval, and plots speed and memories.

    on_model: called with the parts of the model that this process holds, once the model is built and its checkpoint is
        loaded; in every process.
    """

    def __init__(self, on_model: Callable[[Sequence[torch.nn.Module]], None] | None = None) -> None:
        super().__init__()
        self._on_model = on_model

    def start(self) -> None:
        super().start()
        self.recent: deque[tuple[int, float]] = deque(maxlen=INTERVALS_FOR_TIME_LEFT)  # steps, seconds
        self._captures = False
        self._captured: list[str] = []  # Megatron's iteration lines of this iteration

    def patch(self) -> Patch:
        return Patch(
            name="console",
            reason="Megatron's iteration line is too long to read, has no place for the memories or the time left, and "
            "counts a MoM layer as softmax attention in FLOPs",
            removed_when="megatron.training lets a callback print and plot, and num_floating_point_operations asks the "
            "layers",
            targets=(
                FLOPS_TARGET,
                wrap("megatron.training.training", "training_log", self.log),
                wrap("megatron.training.training", "print_rank_last", self.print_rank_last),
                wrap("megatron.training.training", "setup_model_and_optimizer", self.set_up_model),
            ),
        )

    def set_up_model(self, setup_model_and_optimizer, *args, **kwargs):
        """Megatron's function, whose first result is the model; then calls `on_model`."""
        model, *rest = setup_model_and_optimizer(*args, **kwargs)
        if self._on_model is not None:
            self._on_model(model)
        return model, *rest

    def print_rank_last(self, print_rank_last, message) -> None:
        """Megatron's function, with its iteration line captured and its validation line made readable."""
        text = str(message)
        if self._captures and re.match(r" \[[^]]*\] iteration +\d+/", text):
            self._captured.append(text)
        elif text.startswith("---") and not text.strip("-"):
            return  # Megatron rules off a validation line
        else:
            print_rank_last(validation_line(text) or message)

    def before_training_log(self, settings, call: dict) -> None:
        if call["is_first_iteration"]:
            self.start()
        batch_size = (
            settings.micro_batch_size
            * settings.data_parallel_size
            * settings.gtp_weight_remat_size
            * training.get_num_microbatches()
        )
        lengths = call["seqlen_squared_sum_in_batch"], call["total_real_tokens_in_batch"]
        tokens = batch_size * settings.seq_length if lengths[1] is None else lengths[1]
        flops = training.num_floating_point_operations(settings, batch_size, *lengths)
        skipped = bool(call["skipped_iter"])
        self.since_line.add_step(call["loss_dict"], skipped, tokens, flops)
        self.since_write.add_step({}, skipped, tokens, flops)  # Megatron plots the losses itself

    def run_training_log(self, training_log, *args, **kwargs) -> bool:
        self._captures, self._captured = True, []
        try:
            return training_log(*args, **kwargs)
        finally:
            self._captures = False

    def training_seconds(self, just_read: bool) -> float:
        timer = training.get_timers()("interval-time")
        if not just_read:
            timer.elapsed(reset=False)
        return timer.active_time()  # without validation and checkpoints; Megatron never resets this time

    def due(self, settings, call: dict) -> tuple[bool, bool]:
        plots = settings.tensorboard_dir or getattr(settings, "wandb_project", None)
        return (
            call["is_first_iteration"] or call["iteration"] % settings.log_interval == 0,
            bool(plots) and call["iteration"] % settings.tensorboard_log_interval == 0,
        )

    def print_line(self, settings, call: dict, now: float) -> None:
        interval = self.since_line
        if not call["is_first_iteration"]:  # the first iteration compiles kernels and fills caches
            self.recent.append((interval.steps, now - interval.started))
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != settings.world_size - 1:
            return
        line = step_line(
            iteration=call["iteration"],
            total=settings.train_iters,
            losses=interval.mean_losses(),
            skipped=interval.skipped,
            not_finite=int(interval.not_finite),
            grad_norm=call["grad_norm"],
            learning_rate=call["learning_rate"],
            speed=interval.speed(now, settings.world_size),
            routing=interval.routing_report(),
            others=[text for line in self._captured for text in other_fields(line, set(interval.losses))],
            seconds_left=self._seconds_left(settings.train_iters - call["iteration"]),
        )
        training.print_rank_last(line)

    def plot_values(self, settings, now: float) -> dict[str, float]:
        return self.since_write.speed(now, settings.world_size) | super().plot_values(settings, now)

    def _seconds_left(self, steps: int) -> float | None:
        if not self.recent:
            return None
        return steps * sum(seconds for _, seconds in self.recent) / sum(count for count, _ in self.recent)
