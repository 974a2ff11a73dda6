#!/usr/bin/env python
"""Times the recurrences over packed segments beside the kernels that a user would pick instead, in one run.

    python tools/bench_kernels.py [--cases N] [--csv FILE]

Peers: flash-linear-attention's and FlashQLA's gated delta rule, where those packages are installed. A row is the median
time of forward and of forward+backward as the host issues them, of both as CUDA graphs (NaN for the peers, which wait
for the GPU; on a CPU the same as before), and how many times the latter is of what the chip would need at least: its
products at the speed of one large product measured here, or its tensors at the speed of a copy, whichever is longer.
For peers it is the time as issued. Rows are written as they come.
"""

import importlib.util
import math
import os
import sys

import torch
import torch.nn.functional as F
from benchmark import (
    VERSIONS,
    append_csv,
    device_kind,
    graphed,
    median_ms,
    parse_options,
    tune_quickly,
    versions,
)

from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.rules import get_rule
from mom_layers.recur.scalar_delta import gated_delta_rule

# (segments, tokens a segment, heads, K = V)
CASES = {
    "cuda": [(32, 1024, 4, 256), (32, 1024, 8, 128), (4, 8192, 4, 256), (4, 8192, 8, 128)],
    "cpu": [(4, 128, 2, 32)],
}
FIELDS = (*VERSIONS, "kernel", "segments", "tokens", "heads", "head_dim")
FIELDS += ("forward_ms", "both_ms", "forward_graph_ms", "both_graph_ms", "of_floor")


def inputs(segments: int, tokens: int, heads: int, size: int, device: str) -> tuple[dict[str, torch.Tensor], ...]:
    """q, k, v, a decay a head, a decay a key channel and beta; borders of the segments; a gradient of the output."""
    rows, dtype = segments * tokens, torch.bfloat16 if device == "cuda" else torch.float32
    unit = [F.normalize(torch.randn(rows, heads, size, device=device), dim=-1).to(dtype) for _ in range(2)]
    leaves = {
        "q": unit[0],
        "k": unit[1],
        "v": torch.randn(rows, heads, size, device=device, dtype=dtype),
        "g": F.logsigmoid(torch.randn(rows, heads, device=device) + 3),
        "g_channels": F.logsigmoid(torch.randn(rows, heads, size, device=device)) / 16,
        "beta": torch.rand(rows, heads, device=device),
    }
    cu_seqlens = torch.arange(0, rows + 1, tokens, device=device, dtype=torch.int32)
    return {name: x.requires_grad_() for name, x in leaves.items()}, cu_seqlens, torch.randn_like(leaves["v"])


def kernels(device: str, size: int) -> dict:
    """Functions of (leaves, cu_seqlens) that return the output, by name."""
    found = {
        "gated_deltanet": lambda x, cu: gated_delta_rule(x["q"], x["k"], x["v"], x["g"], x["beta"], cu)[0],
        "gla": lambda x, cu: gated_linear_attention(x["q"], x["k"], x["v"], x["g_channels"], cu)[0],
    }

    def peer(operation):
        def run(x, cu):
            q, k, v, g, beta = (x[name][None] for name in ("q", "k", "v", "g", "beta"))
            return operation(q, k, v, g=g, beta=beta, cu_seqlens=cu)[0][0]

        return run

    if device == "cuda" and importlib.util.find_spec("fla"):
        os.environ.setdefault("FLA_FLASH_QLA", "0")  # keeps FLA on its own kernels, so that the two can be told apart
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        found["fla"] = peer(chunk_gated_delta_rule)
    if device == "cuda" and size == 128 and importlib.util.find_spec("flash_qla"):
        from flash_qla import chunk_gated_delta_rule

        found["flash-qla"] = peer(chunk_gated_delta_rule)
    return found


def speeds(device: str) -> tuple[float, float]:
    """FLOP/s of a large product and bytes/s of a large copy, measured."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    b, copy = torch.randn_like(a), torch.empty_like(a)
    product, moved = median_ms(lambda: a @ b, device), median_ms(lambda: copy.copy_(a), device)
    return 2e3 * n**3 / product, 2e3 * a.numel() * a.element_size() / moved


def floor_ms(rule: str, case: tuple[int, int, int, int], speed: tuple[float, float], bytes_each: int) -> float:
    """Three times the forward's products, or q, k, v, o and their gradients once each."""
    segments, tokens, heads, size = case
    rows = segments * tokens
    arithmetic = 3 * get_rule(rule).recurrence_flops(rows, heads, size, size) / speed[0]
    traffic = 8 * rows * heads * size * bytes_each / speed[1]
    return 1e3 * max(arithmetic, traffic)


def main(argv=None) -> int:
    options = parse_options(__doc__, argv)
    device, about = device_kind(), versions()
    tune_quickly()
    speed = speeds(device)
    print(f"{about['device']}: product {speed[0] / 1e12:.3g} TFLOP/s, copy {speed[1] / 1e12:.3g} TB/s")
    print(
        "segments x tokens, heads, size; milliseconds of forward, of forward+backward, of both as CUDA graphs; "
        "the latter over its floor"
    )
    for case in CASES[device][: options.cases]:
        leaves, cu_seqlens, grad = inputs(*case, device)
        for kernel_name, kernel in kernels(device, case[3]).items():
            ours = kernel_name in ("gated_deltanet", "gla")

            def forward(kernel=kernel, leaves=leaves, cu_seqlens=cu_seqlens):
                with torch.no_grad():
                    return kernel(leaves, cu_seqlens)

            def both(kernel=kernel, leaves=leaves, cu_seqlens=cu_seqlens, grad=grad):
                for x in leaves.values():
                    x.grad = None
                kernel(leaves, cu_seqlens).backward(grad)

            times = [median_ms(forward, device), median_ms(both, device)]
            if device == "cuda" and ours:
                times += [median_ms(graphed(forward), device), median_ms(graphed(both), device)]
            else:
                times += [math.nan] * 2 if device == "cuda" else times
            rule = "gla" if kernel_name == "gla" else "gated_deltanet"
            factor = (times[3] if ours else times[1]) / floor_ms(rule, case, speed, grad.element_size())
            shape = f"{case[0]}x{case[1]} H{case[2]} {case[3]}"
            print(f"{shape}  {kernel_name:14s}", *(f"{time:8.3f}" for time in times), f"{factor:6.1f}", flush=True)
            values = (kernel_name, *case, *(f"{time:.4f}" for time in times), f"{factor:.2f}")
            if options.csv:
                append_csv(options.csv, [about | dict(zip(FIELDS[len(VERSIONS) :], values, strict=True))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
