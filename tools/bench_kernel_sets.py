#!/usr/bin/env python
"""Runs the recurrences with every kernel set, and with the tiles of every chip, on the GPU that is here.

    python tools/bench_kernel_sets.py [--cases N] [--csv FILE] [--processes N]

A row is a kernel set or another chip's tiles, forced: the largest error of the output and of every gradient against
the same recurrence in float64 (g's gradient apart, a difference of large sums), and the median time of forward and of
forward+backward. Compiling takes longer than measuring: --processes compiles everything in so many processes first. On
a CPU Triton's interpreter runs the kernels, and times mean nothing. The exit status is 1 where an error is above 1%, or
3% for g's gradient.
"""

import sys

import torch
import torch.nn.functional as F
from benchmark import VERSIONS, append_csv, compile_in_processes, device_kind, median_ms, parse_options, versions

from mom_layers.common.chips import CHIPS, forced
from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.scalar_delta import gated_delta_rule

# (segments, tokens a segment, heads, K, V): the paper's heads, and smaller ones that Hopper's own set leaves alone.
CASES = {
    "cuda": [(32, 1024, 4, 256, 256), (32, 1024, 8, 128, 128), (32, 1024, 16, 64, 32)],
    "cpu": [(2, 70, 1, 32, 32)],
}
FIELDS = (*VERSIONS, "kernel", "forced", "segments", "tokens", "heads", "key_size", "value_size")
FIELDS += ("error", "g_error", "forward_ms", "both_ms")
BOUND, G_BOUND = 1e-2, 3e-2


def rules() -> dict:
    """Functions of (leaves, borders, kernels) that return the output, by name."""
    return {
        "gated_deltanet": lambda x, borders, kernels: gated_delta_rule(
            x["q"], x["k"], x["v"], x["g"], x["beta"], borders, kernels=kernels
        )[0],
        "gla": lambda x, borders, kernels: gated_linear_attention(
            x["q"], x["k"], x["v"], x["g_channels"], borders, kernels=kernels
        )[0],
    }


def inputs(segments: int, tokens: int, heads: int, key_size: int, value_size: int, device: str):
    """Leaves by name, borders of the segments, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(segments * tokens, heads, *shape, generator=generator).to(device)

    dtype = torch.bfloat16
    leaves = {
        "q": F.normalize(draw(key_size), dim=-1).to(dtype),
        "k": F.normalize(draw(key_size), dim=-1).to(dtype),
        "v": draw(value_size).to(dtype),
        "g": F.logsigmoid(draw() + 3),
        "g_channels": F.logsigmoid(draw(key_size)) / 16,
        "beta": draw().sigmoid(),
    }
    borders = torch.arange(0, segments * tokens + 1, tokens, device=device, dtype=torch.int32)
    return {name: x.requires_grad_() for name, x in leaves.items()}, borders, draw(value_size).to(dtype)


def results(rule, leaves, borders, gradient, kernels) -> dict[str, torch.Tensor]:
    """The output and the gradients of the leaves that the rule reads."""
    for leaf in leaves.values():
        leaf.grad = None
    o = rule(leaves, borders, kernels)
    o.backward(gradient.to(o.dtype))
    return {"o": o.detach()} | {name: x.grad for name, x in leaves.items() if x.grad is not None}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def largest_errors(rule, leaves, borders, gradient) -> tuple[float, float]:
    """Of the Triton kernels, on the first two segments: of everything but g's gradient, and of g's gradient."""
    rows = int(borders[2])
    few = {name: x.detach()[:rows].requires_grad_() for name, x in leaves.items()}
    double = {name: x.detach().double().requires_grad_() for name, x in few.items()}
    want = results(rule, double, borders[:3], gradient[:rows], "torch")
    got = results(rule, few, borders[:3], gradient[:rows], "triton")
    errors = {name: error(got[name], want[name]) for name in want}
    gates = [errors.pop(name) for name in ("g", "g_channels") if name in errors]
    return max(errors.values()), max(gates)


def choices(device: str):
    """(what is forced, as the table shows it; arguments of `forced`)."""
    yield "nothing", {}
    yield "general set", {"kernel_set": "general"}
    yield "Blackwell set", {"kernel_set": "Blackwell"}
    # One chip for each size of shared memory; sets with instructions of their own chip are not for another.
    older = {name: chip for name, chip in CHIPS.items() if chip.vendor == "nvidia" and chip.capability < (9, 0)}
    chips = {chip.shared_memory: name for name, chip in older.items()}
    for name in chips.values():
        yield f"tiles of {name}", {"chip": name}


def compile_kernels(case: tuple, rule_name: str, forced_name: str) -> None:
    """Runs a recurrence on two short segments, so that Triton's cache has its kernels."""
    sizes = case[2:]
    leaves, borders, gradient = inputs(2, 128, *sizes, device_kind())
    with forced(**dict(choices(device_kind()))[forced_name]):
        results(rules()[rule_name], leaves, borders, gradient, "triton")


def main(argv=None) -> int:
    options = parse_options(__doc__, argv, processes=True)
    device, about, wrong = device_kind(), versions(), False
    cases = CASES[device][: options.cases]
    if options.processes:
        jobs = [(case, rule, name) for case in cases for rule in rules() for name, _ in choices(device)]
        compile_in_processes(compile_kernels, jobs, options.processes)
    for case in cases:
        leaves, borders, gradient = inputs(*case, device)
        for rule_name, rule in rules().items():
            for forced_name, arguments in choices(device):
                with forced(**arguments):
                    errors = largest_errors(rule, leaves, borders, gradient)

                    def forward(rule=rule, leaves=leaves, borders=borders):
                        with torch.no_grad():
                            rule(leaves, borders, "triton")

                    def both(rule=rule, leaves=leaves, borders=borders, gradient=gradient):
                        results(rule, leaves, borders, gradient, "triton")

                    times = [median_ms(step, device, 100) for step in (forward, both)]
                bad = not (errors[0] <= BOUND and errors[1] <= G_BOUND)
                wrong |= bad
                print(
                    f"{case[0]}x{case[1]} H{case[2]} {case[3]}x{case[4]}  {rule_name:14s} {forced_name:16s}",
                    *(f"{value:9.2e}" for value in errors), *(f"{time:8.3f}" for time in times),
                    "WRONG" if bad else "", flush=True,
                )  # fmt: skip
                values = (rule_name, forced_name, *case, *(f"{value:.3g}" for value in (*errors, *times)))
                if options.csv:
                    append_csv(options.csv, [about | dict(zip(FIELDS[len(VERSIONS) :], values, strict=True))])
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
