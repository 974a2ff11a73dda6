#!/usr/bin/env python
"""Times the recurrence of every rule beside flash-linear-attention's chunk operation of the same rule, in one run.

    python tools/bench_rules.py [--rules NAME ...] [--cases N] [--csv FILE] [--processes N]

A row is an operation at one shape: the median time of forward and of forward+backward, as the host issues them and as
CUDA graphs (on a CPU the same as before; NaN where a graph cannot hold the operation), and the largest relative
difference between the peer's output or gradients and ours. The peer runs where flash-linear-attention is installed and
takes the shape; the peer's sequences are a batch, so that the peer reads no lengths on the host. --processes compiles
all kernels in so many processes before the first row. Rows are written as they come.
"""

import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from benchmark import (
    VERSIONS,
    append_csv,
    compile_in_processes,
    device_kind,
    free_memory,
    graphed,
    median_ms,
    parse_options,
    tune_quickly,
    versions,
)

# (segments, tokens a segment, heads, K = V)
CASES = {
    "cuda": [(32, 1024, 4, 256), (32, 1024, 8, 128), (4, 8192, 4, 256), (4, 8192, 8, 128)],
    "cpu": [(2, 70, 1, 32)],
}
FIELDS = (*VERSIONS, "rule", "kernel", "segments", "tokens", "heads", "head_dim")
FIELDS += ("forward_ms", "both_ms", "forward_graph_ms", "both_graph_ms", "difference")


class Shape(NamedTuple):
    rows: int
    heads: int
    size: int
    device: str


def _draw(shape: Shape, *more: int) -> torch.Tensor:
    return torch.randn(shape.rows, shape.heads, *more, device=shape.device)


def _model_type(shape: Shape) -> torch.dtype:
    return torch.bfloat16 if shape.device == "cuda" else torch.float32


# Gates by their kind, as a typical layer makes them. The functions take a Shape.
GATES: dict[str, Callable[[Shape], torch.Tensor]] = {
    "head decay": lambda shape: F.logsigmoid(_draw(shape) + 3),
    "channel decay": lambda shape: F.logsigmoid(_draw(shape, shape.size)) / 16,
    "forget gate": lambda shape: F.logsigmoid(_draw(shape, shape.size)),
    "write strength": lambda shape: _draw(shape).sigmoid(),
    "channel strength": lambda shape: _draw(shape, shape.size).sigmoid().to(_model_type(shape)),
}


def retention_decay(shape: Shape) -> torch.Tensor:
    """The fixed log decay of every head."""
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(shape.heads, device=shape.device)))


def no_decay(shape: Shape) -> torch.Tensor:
    """A log decay of zero for every row."""
    return torch.zeros(shape.rows, shape.heads, device=shape.device)


class Operation(NamedTuple):
    """How a rule's recurrence is called. Both operations take q, k and v, then what is named here by keyword.

    Attributes:
        ours: a function of a kernel family.
        peer: a function of `fla.ops`.
        gates: by the name that both give the gate, the kind of GATES.
        extra: what only ours takes, by name: functions of the Shape.
        peer_extra: what only the peer takes, by name.
    """

    ours: str
    peer: str
    gates: Mapping[str, str] = {}
    extra: Mapping[str, Callable[[Shape], object]] = {}
    peer_extra: Mapping[str, object] = {}


_DELTA = {"g": "head decay", "beta": "write strength"}
OPERATIONS = {
    "gated_deltanet": Operation("scalar_delta.gated_delta_rule", "gated_delta_rule.chunk_gated_delta_rule", _DELTA),
    "linear_attention": Operation(
        "scalar_decay.scalar_decay",
        "linear_attn.chunk_linear_attn",
        extra={"g": lambda shape: None},
        peer_extra={"normalize": False},
    ),
    "retention": Operation("scalar_decay.scalar_decay", "retention.chunk_retention", extra={"g": retention_decay}),
    "mamba2": Operation("scalar_decay.scalar_decay", "simple_gla.chunk_simple_gla", {"g": "head decay"}),
    "deltanet": Operation(
        "scalar_delta.gated_delta_rule", "delta_rule.chunk_delta_rule", {"beta": "write strength"}, {"g": no_decay}
    ),
    "gla": Operation("channel_decay.gated_linear_attention", "gla.chunk_gla", {"g": "channel decay"}),
    "kda": Operation(
        "channel_delta.kimi_delta_attention", "kda.chunk_kda", {"g": "channel decay", "beta": "write strength"}
    ),
    "gated_deltanet2": Operation(
        "channel_delta.gated_delta_rule_2",
        "gdn2.chunk_gdn2",
        {"g": "channel decay", "b": "channel strength", "w": "channel strength"},
    ),
    "hgrn2": Operation("channel_decay.gated_linear_attention", "gla.chunk_gla", {"g": "forget gate"}),
}


def leaves_of(operation: Operation, shape: Shape) -> dict[str, torch.Tensor]:
    """q and k of unit length, v and the gates."""
    dtype = _model_type(shape)
    leaves = {name: F.normalize(_draw(shape, shape.size), dim=-1).to(dtype) for name in ("q", "k")}
    leaves["v"] = _draw(shape, shape.size).to(dtype)
    leaves |= {name: GATES[kind](shape) for name, kind in operation.gates.items()}
    return {name: leaf.requires_grad_() for name, leaf in leaves.items()}


def kernels_of(name: str, shape: Shape, segments: int) -> dict[str, Callable]:
    """Functions of leaves that return the output [R, H, V], by name: ours first."""
    operation = OPERATIONS[name]
    module, function = operation.ours.rsplit(".", 1)
    ours = getattr(importlib.import_module(f"mom_layers.recur.{module}"), function)
    extra = {key: value(shape) for key, value in operation.extra.items()}
    cu_seqlens = torch.arange(segments + 1, device=shape.device, dtype=torch.int32) * (shape.rows // segments)
    kernels = "triton" if shape.device == "cuda" else "auto"  # at sizes with a fault too: the difference shows it
    found = {name: lambda x: ours(**x, **extra, cu_seqlens=cu_seqlens, kernels=kernels)[0]}
    if shape.device == "cuda" and importlib.util.find_spec("fla"):
        os.environ.setdefault("FLA_FLASH_QLA", "0")  # keeps FLA on its own kernels
        module, function = operation.peer.rsplit(".", 1)
        peer = getattr(importlib.import_module(f"fla.ops.{module}"), function)

        def batch(x):
            sequences = {key: leaf.unflatten(0, (segments, -1)) for key, leaf in x.items()}
            return peer(**sequences, **operation.peer_extra)[0].flatten(0, 1)

        found[f"fla {function}"] = batch
    return found


def results(kernel: Callable, leaves: dict[str, torch.Tensor], gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output and every leaf's gradient."""
    o = kernel(leaves)
    return {"o": o.detach()} | dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), gradient), strict=True))


def largest_difference(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest |got - expected| / |expected| of an output or a gradient."""
    return max(
        ((got[name].float() - x.float()).norm() / x.float().norm().clamp(min=1e-30)).item()
        for name, x in expected.items()
    )


def times_of(kernel: Callable, leaves: dict[str, torch.Tensor], gradient: torch.Tensor, device: str) -> list[float]:
    """Milliseconds of forward and of forward+backward as issued, then of both as CUDA graphs."""

    def forward():
        with torch.no_grad():
            return kernel(leaves)

    def both():
        return torch.autograd.grad(kernel(leaves), list(leaves.values()), gradient)

    issued = [median_ms(forward, device), median_ms(both, device)]
    if device != "cuda":
        return issued + issued
    replayed = []
    for step in (forward, both):
        try:
            replayed.append(median_ms(graphed(step), device))
        except RuntimeError as error:
            print(f"no CUDA graph: {str(error).splitlines()[0]}", file=sys.stderr)
            torch.cuda.synchronize()
            replayed.append(math.nan)
    return issued + replayed


def compile_kernels(case: tuple, rule: str, number: int) -> None:
    """Runs one of a rule's operations at a case's sizes, ours (0) or the peer's (1), so that Triton's cache has its
    kernels."""
    tune_quickly()
    segments, tokens, heads, size = case
    shape = Shape(segments * tokens, heads, size, device_kind())
    leaves = leaves_of(OPERATIONS[rule], shape)
    results(list(kernels_of(rule, shape, segments).values())[number], leaves, torch.randn_like(leaves["v"]))


def main(argv=None) -> int:
    rules = {"rules": (tuple(OPERATIONS), "only these rules")}
    options = parse_options(__doc__, argv, processes=True, choices=rules)
    device, about = device_kind(), versions()
    tune_quickly()
    cases = CASES[device][: options.cases]
    if options.processes:
        # Of the cases that differ in the number of segments alone, the first has all kernels.
        sizes = list({case[2:]: case for case in reversed(cases)}.values())
        jobs = [(case, rule, number) for case in sizes for rule in options.rules for number in range(2)]
        compile_in_processes(compile_kernels, jobs, options.processes)
    print(
        f"{about['device']}: segments x tokens, heads, size; milliseconds of forward, of forward+backward, of both as "
        "CUDA graphs; the largest relative difference from our results"
    )
    for case in cases:
        segments, tokens, heads, size = case
        shape = Shape(segments * tokens, heads, size, device)
        for name in options.rules:
            torch.manual_seed(0)
            leaves = leaves_of(OPERATIONS[name], shape)
            gradient, ours = torch.randn_like(leaves["v"]), None
            for kernel_name, kernel in kernels_of(name, shape, segments).items():
                try:
                    got = results(kernel, leaves, gradient)
                    ours = got if ours is None else ours
                    values = [*times_of(kernel, leaves, gradient, device), largest_difference(got, ours)]
                except Exception as error:
                    if kernel_name == name:
                        raise
                    print(f"{kernel_name} does not run: {type(error).__name__}: {error}".splitlines()[0][:160])
                    continue
                shown = f"{segments}x{tokens} H{heads} {size}  {name:16s} {kernel_name:28s}"
                print(shown, *(f"{value:8.3f}" for value in values[:4]), f"{values[4]:9.1e}", flush=True)
                texts = (name, kernel_name, *case, *(f"{value:.4g}" for value in values))
                if options.csv:
                    append_csv(options.csv, [about | dict(zip(FIELDS[len(VERSIONS) :], texts, strict=True))])
            del leaves, gradient, ours, got
            free_memory()
    return 0


if __name__ == "__main__":
    sys.exit(main())
