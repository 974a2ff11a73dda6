"""What the output of a shrunk run says: it trains, it was refused with a line, or it fails with a last line."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

TRAINS, REFUSED, FAILS, STOPS = "trains", "refused", "fails", "stops as told"
INJECTED = re.compile(
    r"Injecting error type (\w+ error)$.*(Possible transient error|First rerun: unexpected result is reproducible)",
    re.DOTALL | re.MULTILINE,
)
"""What Megatron's rerun machinery prints about an error that a command tells the machinery to inject."""
STATUS_OF_RERUNS = (16, 17)
"""The exit statuses with which the machinery ends a run: the checkpoint is to be resumed, or the result is wrong."""
LEAST_FALL = 0.01
"""The share of the first loss by which the last must be smaller: the learning rate and the data let it fall further."""
LEAST_NORM = 0.05
"""The smallest gradient norm, as a share of the first one, that counts as training."""

NUMBER = r"(\S+)"
STEP = re.compile(r"^.*\biteration\s+(\d+)/\s*\d+ \|.*$", re.MULTILINE)
LOSS = re.compile(rf"\| (?:lm loss|mtp_1 loss): {NUMBER}")
NORM = re.compile(rf"\| grad norm: {NUMBER}")
VALIDATION = re.compile(rf"validation loss at iteration \d+ on \S+ set \| lm loss value: {NUMBER}")
ERROR = re.compile(r"^(?:[\w.]*(?:Error|Exception|Interrupt|Exit)\b.*|\S+\.py: error: .*|error: .*)$", re.MULTILINE)
REFUSAL = re.compile(r"^(?:ValueError|AssertionError|ImportError|ModuleNotFoundError): |^RuntimeError: --|error: ")
NOISE = ("ChildFailedError", "SignalException", "DistBackendError", "Connection reset", "Connection closed", "gloo")
"""What the other processes of a run say when the first one ends."""


@dataclass(frozen=True)
class Step:
    """What a training step printed, as text: resumed runs are compared in every printed digit."""

    number: int
    loss: str | None
    norm: str | None


@dataclass(frozen=True)
class Verdict:
    result: str
    reason: str = ""


def steps_of(output: str) -> dict[int, Step]:
    """The training steps that a run printed."""
    steps = {}
    for line in STEP.finditer(output):
        loss, norm = LOSS.search(line[0]), NORM.search(line[0])
        number = int(line[1])
        steps[number] = Step(number, loss and loss[1], norm and norm[1])
    return steps


def last_error(output: str) -> str:
    """The line that says why a run ended; "" where none does."""
    errors = [line.strip() for line in ERROR.findall(output)]
    telling = [line for line in errors if not any(word in line for word in NOISE)]
    return next(reversed(telling or errors), "")


def judge(status: int | None, output: str, steps: int) -> Verdict:
    """The verdict on a run.

    Args:
        status: its exit status; None for a run that was stopped at its time limit.
        output: stdout and stderr of all its processes.
        steps: the number of training steps that it was to make.
    """
    if status is None:
        return Verdict(FAILS, "no end within the time limit")
    found = steps_of(output)
    if status in STATUS_OF_RERUNS and (injected := INJECTED.search(output)):
        return Verdict(
            STOPS, f"exit status {status}: Megatron's rerun machinery found its injected {injected[1].lower()}"
        )
    if status != 0:
        line = last_error(output) or f"exit status {status} without an error"
        return Verdict(REFUSED if not found and REFUSAL.search(line) else FAILS, line)
    if len(found) < steps:
        return Verdict(FAILS, f"{len(found)} of {steps} steps, and exit status 0")
    losses = [float(step.loss) for step in found.values() if step.loss]
    norms = [float(step.norm) for step in found.values() if step.norm]
    if not losses or not all(map(math.isfinite, losses)):
        return Verdict(FAILS, f"losses {losses}")
    if losses[-1] > losses[0] * (1 - LEAST_FALL):
        return Verdict(FAILS, f"the loss does not move: {losses[0]:g} at the first step, {losses[-1]:g} at the last")
    if norms and not min(norms) >= LEAST_NORM * norms[0]:
        return Verdict(FAILS, f"the gradient norm collapses: {norms[0]:g} at the first step, then {min(norms):g}")
    return Verdict(TRAINS, f"loss {losses[0]:.3f} to {losses[-1]:.3f}")


def compare(whole: str, resumed: str, saved: int) -> str:
    """Where a run that was resumed at step `saved` first differs from the one that was not; "" where nowhere."""
    expected, found = steps_of(whole), steps_of(resumed)
    for number, step in expected.items():
        if number <= saved:
            continue
        again = found.get(number)
        if again is None:
            return f"step {number} is missing after the resumption"
        # Megatron prints the mean of two steps as the loss of the second step of a process.
        if again.norm != step.norm or (again.loss != step.loss and number != saved + 2):
            return f"step {number}: loss {step.loss}, norm {step.norm}; resumed loss {again.loss}, norm {again.norm}"
    if VALIDATION.findall(whole) != VALIDATION.findall(resumed):
        return f"validation losses {VALIDATION.findall(whole)}; resumed {VALIDATION.findall(resumed)}"
    return "" if saved + 1 in expected else f"no step after {saved}"
