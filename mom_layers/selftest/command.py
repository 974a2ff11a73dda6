"""Checks every kernel of mom_layers on this machine's GPU against plain PyTorch in float64, and times the kernels.

    python -m mom_layers.selftest
    python -m mom_layers.selftest --only gated_deltanet --only combine

A line a kernel says: right or WRONG, the error that is nearest to its bound with that bound, the milliseconds of a
forward and backward pass at a larger shape, and how much of that time the card would need for the bytes or operations
alone ("floor", from a copy and a matrix product that are timed first). Needs torch and Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from mom_layers.selftest import report
from mom_layers.selftest.cases import Clock, Line, check_task

GIGABYTES_A_WORKER = 7
"""Of the card's memory: the plain loop keeps a float64 state for every row."""
MOST_WORKERS = 12
CANNOT_RUN = 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mom_layers.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit status: 0 all right, 1 a kernel is wrong, 2 the kernels cannot run here.",
    )
    parser.add_argument("--only", action="append", default=[], metavar="PART", help="checks whose name has this part")
    parser.add_argument("--list", action="store_true", help="print the names of the checks and end")
    parser.add_argument("--no-times", action="store_true", help="leave out the times")
    parser.add_argument(
        "--jobs", type=int, metavar="N", help="processes that check side by side (default: by the card)"
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="file for tracebacks (default: in the temporary folder)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, 1 where a kernel is wrong, 2 where no kernel can run."""
    options = parse_arguments(argv)
    if reason := why_not():
        print(f"error: {reason}", file=sys.stderr)
        return CANNOT_RUN
    from mom_layers.selftest.plan import Plan

    plan = Plan(device_kind(), main_type(), 3 if torch.cuda.is_available() else 1, tuple(options.only))
    names = list(plan.checks())
    if options.list or not names:
        print("\n".join(names) if names else f"error: no check has a name with {options.only}", file=sys.stderr)
        return 0 if names else CANNOT_RUN
    clock = Clock()
    print(report.HEADER, flush=True)
    if plan.device == "cuda":
        lines, speeds = _on_the_card(plan, options)
    else:
        lines, speeds = list(_in_this_process(plan)), None
    print("\n" + report.verdict(lines, clock.seconds()))
    log = options.log or Path(tempfile.gettempdir()) / f"mom-selftest-{os.getpid()}.log"
    if write_log(log, lines):
        print(f"tracebacks: {log}")
    print("\nfor a report:\n" + report.block(lines, clock.seconds(), speeds, plan.dtype))
    return 0 if all(line.right for line in lines) else 1


def why_not() -> str | None:
    """Why no kernel can run here, and what to do; None where kernels can run."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton; without Triton use kernels='torch' (--mom-kernels torch)"
    if torch.cuda.is_available():
        return None
    import triton

    if triton.knobs.runtime.interpret:
        return None
    return (
        "PyTorch finds no CUDA device: the kernels run on GPUs alone, and without a GPU layers compute in PyTorch. "
        "(TRITON_INTERPRET=1 runs tiny shapes in Triton's interpreter, for the project's own tests.)"
    )


def device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def main_type() -> str:
    """The 16-bit type that this chip multiplies; float32 in the interpreter."""
    if not torch.cuda.is_available():
        return "float32"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "float16"
    return "bfloat16"


def default_jobs() -> int:
    """Processes that the card's memory and the machine's cores allow."""
    memory = torch.cuda.get_device_properties(0).total_memory / 1e9
    return max(1, min(MOST_WORKERS, int(memory // GIGABYTES_A_WORKER), len(os.sched_getaffinity(0))))


def _on_the_card(plan, options) -> tuple[list[Line], tuple[float, float] | None]:
    """Checks side by side first, then times one after another on a card that is idle otherwise."""
    from mom_layers.selftest.processes import Timer, check_all

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\rchecked {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    found = check_all(plan, options.jobs or default_jobs(), progress)
    speeds = None
    if options.no_times:
        for lines in found.values():
            print(*map(report.row, lines), sep="\n", flush=True)
    else:
        timer = Timer(plan)
        try:
            speeds = timer.speeds()
            print(report.speeds_row(speeds, plan.dtype), flush=True)
            for name, lines in found.items():
                timer.add_times(name, lines, speeds)
                print(*map(report.row, lines), sep="\n", flush=True)
        finally:
            timer.close()
    return [line for lines in found.values() for line in lines], speeds


def _in_this_process(plan):
    """The lines of Triton's interpreter, one after another."""
    setting = plan.setting
    for check in plan.checks().values():
        for task in check(setting):
            line = check_task(task, setting)
            print(report.row(line), flush=True)
            yield line


def write_log(path: Path, lines: Sequence[Line]) -> bool:
    """Writes what is wrong, with every traceback, to a file. Returns whether there was anything."""
    wrong = [line for line in lines if not line.right]
    if wrong:
        parts = ["\n".join([report.row(line), line.details]) for line in wrong]
        path.write_text("\n\n".join(parts) + "\n")
    return bool(wrong)
