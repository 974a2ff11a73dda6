"""Trains many small models at once on the same batches: on a GPU a model's step is a CUDA graph on its own stream."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from linear_moe.recall.models import Mixer, RecallModel, Shape
from linear_moe.recall.task import HELD_OUT_SEED, Batch, Sampler, Task

WARM_UP_CALLS = 3  # of a step before its capture: kernels are compiled, workspaces and the optimizer's state allocated
SPEED_STEPS = 50  # after which the time that a group needs is known
HELD_OUT_BATCHES = 4  # of an evaluation during training
FINAL_BATCHES = 16  # of the last evaluation, which is the result
MARGIN = 1.05  # of the time that a group is expected to need: evaluations, and steps that vary


@dataclass(frozen=True)
class Training:
    """How every model is trained. The rate rises linearly, is constant, and falls linearly to zero.

    Attributes:
        warm_up, decay: their shares of the steps.
        weight_decay: of tensors with two or more dimensions.
        balancing: coefficient of the balancing loss.
        clip: the gradient's norm at most.
        evaluations: along training, evenly spread.
    """

    steps: int = 16000
    warm_up: float = 0.05
    decay: float = 0.25
    weight_decay: float = 0.01
    balancing: float = 1e-2
    clip: float = 1.0
    evaluations: int = 32

    def scale(self, step: int) -> float:
        """The share of the peak rate at a step, counted from 0."""
        rising = (step + 1) / max(1, round(self.warm_up * self.steps))
        falling = (self.steps - step) / max(1, round(self.decay * self.steps))
        return min(1.0, rising, falling)

    def evaluation_steps(self) -> list[int]:
        """Numbers of steps after which the models are evaluated; the last is all of them."""
        count = min(self.evaluations, self.steps)
        return sorted({-(-self.steps * (i + 1) // count) for i in range(count)})


@dataclass(frozen=True)
class Settings:
    """All that is the same for every model of a comparison."""

    task: Task = field(default_factory=Task)
    shape: Shape = field(default_factory=Shape)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Job:
    """One model to train: its mixer, peak learning rate and seed (of the weights and of the batches)."""

    mixer: Mixer
    rate: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What a trained model does on held-out sequences.

    Attributes:
        accuracy: share of the queries named right, for every number of pairs.
        curve: (steps, accuracy averaged over the numbers of pairs) along training.
        loss: cross entropy in nats a query, averaged over the last steps between two evaluations.
        flat: whether the curve is, by `is_flat`.
        seconds: that the whole group took.
        group: models that trained at once.
    """

    job: Job
    accuracy: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    loss: float
    flat: bool
    seconds: float
    group: int


class OutOfTime(Exception):
    """The time limit ended the training; the message says what was given up."""


def is_flat(curve: Sequence[tuple[int, float]], training: Training, gain: float = 0.01) -> bool:
    """The stop rule: at a constant rate the accuracy has ceased to grow.

    Its mean over the last eighth of the steps before the rate falls is at most ``gain`` above its mean over the eighth
    before that.
    """
    end = (1 - training.decay) * training.steps
    eighth = training.steps / 8

    def mean(first: float, last: float) -> float:
        values = [accuracy for step, accuracy in curve if first < step <= last]
        return sum(values) / len(values) if values else 0.0

    return mean(end - eighth, end) - mean(end - 2 * eighth, end - eighth) <= gain


class TrainedModel:
    """A model with its optimizer, and the step that changes both.

    On a GPU the model computes in bf16 from weights that are kept, and stepped, in float32; elsewhere all is float32.

    Args:
        batch: read by every step; the caller writes every next batch into the same tensors.
        scale: scalar on the device, by which the peak rate is multiplied.
    """

    def __init__(self, job: Job, settings: Settings, batch: Batch, scale: torch.Tensor):
        self.job, self.settings, self.batch, self.scale = job, settings, batch, scale
        device = scale.device
        torch.manual_seed(job.seed)
        self.model = RecallModel(job.mixer, settings.shape, settings.task.vocabulary)
        exact = [p.detach().to(device, torch.float32, copy=True) for p in self.model.parameters() if p.requires_grad]
        self.model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.exact = [torch.nn.Parameter(tensor) for tensor in exact]
        for parameter in self.exact:
            parameter.grad = torch.zeros_like(parameter)
        self.rate = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.exact if p.dim() > 1], "weight_decay": settings.training.weight_decay},
                {"params": [p for p in self.exact if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=self.rate,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.loss_sum = torch.zeros((), device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream: torch.cuda.Stream | None = None

    def step(self) -> None:
        """Forward, backward, clipping and AdamW, without a wait for the device."""
        training = self.settings.training
        total, loss = self.model.losses(self.batch, training.balancing)
        gradients = torch.autograd.grad(total, self.parameters)
        torch._foreach_copy_([parameter.grad for parameter in self.exact], gradients)
        torch.nn.utils.clip_grad_norm_(self.exact, training.clip)
        torch.mul(self.scale, self.job.rate, out=self.rate)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.exact)
        self.loss_sum += loss.detach()

    def capture(self) -> None:
        """Records the step as a CUDA graph on a stream of its own, and leaves weights and optimizer as they were."""
        self.stream = torch.cuda.Stream(self.scale.device)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.scale.zero_()  # at a rate of 0 a step leaves the weights alone
            for _ in range(WARM_UP_CALLS):
                self.step()
        self.stream.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=self.stream):
            self.step()
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self.loss_sum.zero_()
        torch.cuda.synchronize()

    def advance(self) -> None:
        """One step: a replay on the model's stream, after what is queued on the current one; or the step itself."""
        if self.graph is None:
            self.step()
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def join(self) -> None:
        """Makes the current stream wait for the model's."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)

    @torch.no_grad()
    def accuracy(self, batches: Sequence[Batch], pairs_of_query: torch.Tensor) -> torch.Tensor:
        """[N] share of the queries named right, for every number of pairs."""
        right = torch.zeros(len(self.settings.task.pairs), device=self.scale.device)
        for batch in batches:
            logits, _ = self.model(batch)
            right.index_add_(0, pairs_of_query, (logits.argmax(1) == batch.targets).float())
        return right / (len(batches) * torch.bincount(pairs_of_query, minlength=len(right)))


def train_group(
    jobs: Sequence[Job],
    settings: Settings,
    device: torch.device,
    deadline: float = float("inf"),
    say: Callable[[str], None] = print,
) -> list[Result]:
    """Trains models together. Models of one seed read the same batches in the same order.

    Where the time up to ``deadline`` does not suffice for all, the last jobs are given up, as soon as that is seen.

    Args:
        deadline: of ``time.monotonic()``.
        say: gets a line after every evaluation.

    Returns:
        results of the jobs that were trained, in their order.

    Raises:
        OutOfTime: no job can end, or did end, before the deadline.
    """
    start = time.monotonic()
    if start >= deadline:
        raise OutOfTime(f"{len(jobs)} models were not begun: no time is left")
    training, task = settings.training, settings.task
    scale = torch.zeros((), device=device)
    samplers = {job.seed: Sampler(task, device, job.seed) for job in jobs}
    batches = {seed: sampler.draw() for seed, sampler in samplers.items()}
    for seed, sampler in samplers.items():
        sampler.generator.manual_seed(seed)  # the batch above served to allocate, and comes again
    held_out = {seed: Sampler(task, device, HELD_OUT_SEED + seed) for seed in samplers}
    held_out_batches = {seed: [s.draw() for _ in range(FINAL_BATCHES)] for seed, s in held_out.items()}
    models = [TrainedModel(job, settings, batches[job.seed], scale) for job in jobs]
    if device.type == "cuda":
        for model in models:
            model.capture()
        say(f"{len(models)} steps compiled and captured in {time.monotonic() - start:.0f} s")
    trained = time.monotonic()

    curves: dict[Job, list[tuple[int, float]]] = {job: [] for job in jobs}
    evaluation_steps, last = set(training.evaluation_steps()), 0
    for step in range(1, training.steps + 1):
        scale.fill_(training.scale(step - 1))
        for seed in samplers:
            samplers[seed].fill(batches[seed])
        for model in models:
            model.advance()
        for model in models:
            model.join()
        if step == min(SPEED_STEPS, training.steps // 2):
            models = _that_fit(models, step, training.steps, trained, deadline, device, say)
        if step not in evaluation_steps:
            continue
        count = FINAL_BATCHES if step == training.steps else HELD_OUT_BATCHES
        accuracies = torch.stack(
            [
                model.accuracy(held_out_batches[model.job.seed][:count], samplers[model.job.seed].pairs_of_query)
                for model in models
            ]
        ).tolist()
        losses = (torch.stack([model.loss_sum for model in models]) / (step - last)).tolist()
        for model, accuracy in zip(models, accuracies, strict=True):
            model.loss_sum.zero_()
            curves[model.job].append((step, sum(accuracy) / len(accuracy)))
        last, now = step, time.monotonic()
        left = (now - trained) / step * (training.steps - step)
        shown = " ".join(f"{100 * curves[model.job][-1][1]:.0f}" for model in models)
        say(f"step {step} of {training.steps}, {1e3 * (now - trained) / step:.1f} ms, {left:.0f} s left, %: {shown}")
        if now > deadline and step < training.steps:
            raise OutOfTime(f"{len(models)} models were at step {step} of {training.steps} at the time limit")
    seconds = time.monotonic() - start
    return [
        Result(
            model.job,
            tuple(accuracy),
            tuple(curves[model.job]),
            loss,
            is_flat(curves[model.job], training),
            seconds,
            len(models),
        )
        for model, accuracy, loss in zip(models, accuracies, losses, strict=True)
    ]


def _that_fit(models, step, steps, trained, deadline, device, say):
    """The first models, as many as can end before the deadline at the speed so far. Raises OutOfTime for none."""
    if deadline == float("inf"):
        return models
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.monotonic()
    needed = MARGIN * (now - trained) / step * (steps - step)
    count = min(len(models), int(len(models) * max(0.0, deadline - now) / needed)) if needed > 0 else len(models)
    if count == 0:
        raise OutOfTime(f"{len(models)} models need {needed:.0f} s, and {max(0.0, deadline - now):.0f} s are left")
    if count < len(models):
        say(f"{len(models)} models need {needed:.0f} s: {len(models) - count} of them are left for another run")
    return models[:count]


def free_memory() -> None:
    """Gives back what earlier models and graphs held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
