"""What a check of the self-test is, and how its numbers are compared with the plain loop in float64."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

import torch

# The largest relative error of an output or a gradient, |got - expected| / |expected|, by the type of the inputs. The
# gradients of gates are differences of sums over all later rows, which nearly cancel: their bound is the second.
BOUNDS = {torch.float32: (2e-5, 2e-4), torch.bfloat16: (1e-2, 3e-2), torch.float16: (2e-3, 1e-2)}

# A norm that a float64 loop may have in place of zero.
ZERO = 1e-10
# In messages of CUDA: other processes have the card's memory, or the card.
OTHER_CAUSES = ("out of memory", "busy or unavailable")


@dataclass(frozen=True)
class Setting:
    """Where and how checks run.

    Attributes:
        device: "cuda", or "cpu" for Triton's interpreter.
        dtype: of the inputs in most checks: bfloat16, or float16 where the chip has no bfloat16.
        repeats: runs of the kernels, of which the worst counts: a fault of a compiler may show in some runs only.
    """

    device: str
    dtype: torch.dtype
    repeats: int = 3

    def draw(self, *shape: int, seed: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        """Normal random numbers, the same on every device, rounded to ``dtype`` (the setting's where absent)."""
        numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return (scale * numbers).to(self.device, self.dtype if dtype is None else dtype)

    def borders(self, lengths: Iterable[int]) -> torch.Tensor:
        """[S + 1] int32 from the lengths of S segments."""
        return torch.tensor([0, *lengths]).cumsum(0).int().to(self.device)


@dataclass(frozen=True)
class Case:
    """One comparison of kernels with the plain loop.

    Attributes:
        leaves: floating-point inputs by name. Their gradients are compared where ``gradients`` says so.
        run: leaves -> outputs by name, by the kernels. Whole numbers among the outputs must be equal.
        reference: the same in plain PyTorch; receives the leaves in float64.
        loose: leaves, and outputs, that have the second bound of BOUNDS.
        gradients: compare the gradients of every leaf too, for random gradients of all outputs.
    """

    leaves: dict[str, torch.Tensor]
    run: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    reference: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
    loose: tuple[str, ...] = ()
    gradients: bool = True


@dataclass(frozen=True)
class Work:
    """What is timed.

    Attributes:
        step: the call, forward and backward where there is a backward pass.
        moved: bytes that the call must read or write at least.
        flops: floating-point operations of its matrix products.
    """

    step: Callable[[], object]
    moved: float
    flops: float = 0.0


@dataclass(frozen=True)
class Task:
    """One line of the report.

    Attributes:
        kernel: what is checked.
        shape: with which sizes, types and kernel set.
        cases: the comparisons, built when they run. The worst one counts.
        work: builds what is timed; None where nothing is.
        dtype: of the inputs, which decides the bounds.
        around: makes a context for all of the above.
    """

    kernel: str
    shape: str
    cases: tuple[Callable[[], Case], ...]
    dtype: torch.dtype
    work: Callable[[], Work] | None = None
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Line:
    """What came out of a task.

    Attributes:
        kernel, shape: of the task.
        right: whether every number is within its bound.
        error, bound, of: of the number that is closest to its bound, or farthest beyond; ``of`` is its name.
        wrong: all numbers beyond their bounds, in words.
        failure: the last line of an exception, where one ended the task.
    unknown: whether the failure says nothing about the kernel: no memory, no process, no answer in time.
        details: a traceback, for the log.
        milliseconds, floor: time of the call, and the least time that the card needs for its bytes or operations.
    """

    kernel: str
    shape: str
    right: bool = True
    error: float = 0.0
    bound: float = 0.0
    of: str = ""
    wrong: list[str] = field(default_factory=list)
    failure: str = ""
    unknown: bool = False
    details: str = ""
    milliseconds: float | None = None
    floor: float | None = None

    as_dict = asdict


# A check is a generator of tasks: its code after a `yield` runs when the task before has run.
Check = Callable[[Setting], Iterator[Task]]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected|, or |got - expected| where expected is zero but for rounding; infinity where a
    difference is not finite, and for another shape."""
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.detach().double(), expected.detach().double()
    norm = expected.norm()
    error = (got - expected).norm() / torch.where(norm > ZERO, norm, 1.0)
    return error.item() if error.isfinite() else float("inf")


@contextlib.contextmanager
def poisoned_memory():
    """Fresh memory holds NaN, so that an element that no kernel wrote shows in the error."""
    places = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    before = [getattr(owner, name) for owner, name in places]

    def poisoned(fresh):
        def call(*args, **kwargs):
            out = fresh(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return call

    try:
        for (owner, name), fresh in zip(places, before, strict=True):
            setattr(owner, name, poisoned(fresh))
        yield
    finally:
        for (owner, name), fresh in zip(places, before, strict=True):
            setattr(owner, name, fresh)


def _outputs_and_gradients(function, leaves, gradients: bool, weights: dict) -> dict[str, torch.Tensor]:
    """All outputs, and "d" + name for the gradient of each leaf; fills ``weights`` where they have no tensor yet."""
    leaves = {name: x.detach().clone().requires_grad_(gradients) for name, x in leaves.items()}
    with torch.set_grad_enabled(gradients):
        outputs = {name: x for name, x in function(leaves).items() if x is not None}
    found = {name: x.detach() for name, x in outputs.items()}
    if not gradients:
        return found
    outputs = {name: x for name, x in outputs.items() if x.requires_grad}
    for number, (name, x) in enumerate(outputs.items()):
        if name not in weights:
            random = torch.randn(x.shape, generator=torch.Generator().manual_seed(1000 + number))
            weights[name] = random.to(x.device, x.dtype)
    given = [weights[name].to(x.dtype) for name, x in outputs.items()]
    got = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given, allow_unused=True)
    for (name, leaf), gradient in zip(leaves.items(), got, strict=True):
        found[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found


def compare(case: Case, dtype: torch.dtype, repeats: int) -> dict[str, tuple[float, float]]:
    """The error and the bound of every output and every gradient, by name."""
    weights, errors, expected = {}, {}, None
    for _ in range(repeats):
        with poisoned_memory():
            got = _outputs_and_gradients(case.run, case.leaves, case.gradients, weights)
        if expected is None:
            double = {name: x.detach().double() for name, x in case.leaves.items()}
            expected = _outputs_and_gradients(case.reference, double, case.gradients, weights)
        if got.keys() != expected.keys():
            raise AssertionError(f"the kernels return {sorted(got)}, the plain loop {sorted(expected)}")
        for name, want in expected.items():
            if not want.is_floating_point():
                error, bound = float((got[name].long() != want.to(got[name].device).long()).sum()), 0.0
            else:
                usual, loose = BOUNDS[dtype]
                bound = loose if name in case.loose or name.removeprefix("d") in case.loose else usual
                error = relative_error(got[name], want.to(got[name].device))
            errors[name] = (max(error, errors.get(name, (0.0, 0.0))[0]), bound)
    return errors


def check_task(task: Task, setting: Setting) -> Line:
    """Runs every case of a task. An exception becomes a part of the line."""
    line, worst = Line(task.kernel, task.shape), -1.0
    try:
        with task.around():
            for build in task.cases:
                for name, (error, bound) in compare(build(), task.dtype, setting.repeats).items():
                    if not error <= bound:
                        line.wrong.append(f"{name} is off by {error:.2g}, the bound is {bound:.2g}")
                    share = error / bound if bound else (float("inf") if error else 0.0)
                    if share > worst:
                        worst, line.error, line.bound, line.of = share, error, bound, name
    except Exception as error:
        _failed(line, error)
    line.right = not line.wrong and not line.failure
    return line


def time_task(task: Task, milliseconds: Callable[[Callable[[], object]], float]) -> Line:
    """Times a task's work with the given clock. ``floor`` is left to the caller, who has the card's speeds."""
    line = Line(task.kernel, task.shape)
    if task.work is not None:
        try:
            with task.around():
                work = task.work()
                line.milliseconds = milliseconds(work.step)
                line.floor = [work.moved, work.flops]
        except Exception as error:
            _failed(line, error)
    line.right = not line.failure
    return line


def _failed(line: Line, error: Exception) -> None:
    words = " ".join(str(error).split())
    line.failure = f"{type(error).__name__}: {words}"[:300]
    line.unknown = any(reason in words for reason in OTHER_CAUSES)
    line.details = traceback.format_exc()


class Clock:
    """Seconds since it was made."""

    def __init__(self):
        self.start = time.perf_counter()

    def seconds(self) -> float:
        return time.perf_counter() - self.start
