"""How results are printed: a line a kernel, and a block for a report."""

from __future__ import annotations

from collections.abc import Iterable

from mom_layers.selftest.cases import Line
from mom_layers.selftest.versions import versions

HEADER = f"{'':5}  {'kernel':34} {'with':50} {'error (bound), of':34} {'ms':>8} {'floor':>6}"


def row(line: Line) -> str:
    """right or WRONG, kernel, shape, the error nearest to its bound, milliseconds, and the floor's share of them."""
    number = f"{line.error:.1e} ({line.bound:.0e}) {line.of}" if line.of else "-"
    time = "-" if line.milliseconds is None else f"{line.milliseconds:.3f}"
    share = "-" if not line.milliseconds or line.floor is None else f"{100 * line.floor / line.milliseconds:.0f} %"
    words = f"{'right' if line.right else 'WRONG'}  {line.kernel:34} {line.shape:50} {number:34} {time:>8} {share:>6}"
    return "\n".join([words, *reasons(line)])


def reasons(line: Line) -> list[str]:
    """Why a line is wrong, each reason indented."""
    return [f"       {reason}" for reason in [*line.wrong, line.failure] if reason]


def speeds_row(speeds: tuple[float, float] | None, dtype: str) -> str:
    """The card's speeds."""
    if speeds is None:
        return "this card: its copy and its product could not be timed"
    return f"this card: copy {speeds[0] / 1e12:.2f} TB/s, {dtype} product {speeds[1] / 1e12:.0f} TFLOP/s"


def verdict(lines: Iterable[Line], seconds: float) -> str:
    """How many kernels are right."""
    lines = list(lines)
    wrong = sum(not line.right for line in lines)
    return f"{len(lines) - wrong} right, {wrong} wrong, in {seconds:.0f} seconds"


def block(lines: Iterable[Line], seconds: float, speeds: tuple[float, float] | None, dtype: str) -> str:
    """A fenced block that a reader can paste into a report: versions, the card, the verdict, what is wrong."""
    lines = list(lines)
    rows = [f"{name}: {value}" for name, value in versions().items()]
    if speeds is not None:
        rows.append(speeds_row(speeds, dtype))
    rows.append(f"kernels: {verdict(lines, seconds)}")
    for line in lines:
        if not line.right:
            rows += [f"WRONG: {line.kernel}, {line.shape}".rstrip(", "), *reasons(line)]
    return "\n".join(["```", *rows, "```"])
