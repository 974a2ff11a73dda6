#!/usr/bin/env python
"""Times the Mixture-of-Memories layer beside what a user would pick instead, in one run.

    python tools/bench_layers.py [--cases N] [--csv FILE]

Peers: softmax attention (PyTorch's), and flash-linear-attention's MomAttention and GatedDeltaNet where that package is
installed. A row is the median time of forward and of forward+backward, and the peak memory of forward+backward.
"""

import argparse
import csv
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from mom_layers import MixtureOfMemories

# (sequences, tokens, hidden size); 4 heads x 256, 4 memories, top-2, shared memory: the paper's 380M and 1.3B layers
CASES = {
    "cuda": [(8, 2048, 1024), (1, 16384, 1024), (1, 65536, 1024), (8, 2048, 2048), (1, 32768, 2048)],
    "cpu": [(4, 256, 256)],
}
HEADS = {"cuda": (4, 256), "cpu": (4, 32)}  # heads and their key size
FIELDS = ("device", "torch", "triton", "layer", "batch", "tokens", "hidden", "forward_ms", "both_ms", "peak_gib")


class SoftmaxAttention(torch.nn.Module):
    """Causal softmax attention with heads of 128 (fewer where the hidden size is smaller)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = torch.nn.Linear(hidden, hidden, bias=False)
        self.head_dim = min(128, hidden)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def layers(hidden: int, device: str) -> dict[str, torch.nn.Module]:
    """The layers to time, by name."""
    heads, head_dim = HEADS[device]
    found = {
        "mom": MixtureOfMemories(hidden, heads, head_dim),
        "softmax": SoftmaxAttention(hidden),
    }
    if device == "cuda" and importlib.util.find_spec("fla"):
        from fla.layers import GatedDeltaNet, MomAttention

        shape = {"hidden_size": hidden, "head_dim": head_dim, "num_heads": heads, "expand_v": 1, "layer_idx": 0}
        found["fla-mom"] = MomAttention(num_memories=4, topk=2, shared_mem=True, **shape)
        found["fla-gdn"] = GatedDeltaNet(**shape)
    return found


def median_ms(step, device: str) -> float:
    """Median time of a call in milliseconds, after warming up."""
    if device == "cuda":
        from triton.testing import do_bench

        for _ in range(3):
            step()
        return do_bench(step, warmup=200, rep=400, return_mode="median")
    step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(layer: torch.nn.Module, case: tuple[int, int, int], device: str) -> tuple[float, float, float]:
    """Forward and forward+backward in milliseconds, and the peak memory of the latter in GiB (0 on a CPU)."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    layer = layer.to(device, dtype).train()
    x = torch.randn(*case, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)

    def forward():
        y = layer(x)
        return y[0] if isinstance(y, tuple) else y

    def both():
        layer.zero_grad(set_to_none=True)
        x.grad = None
        forward().backward(grad)

    peak = 0.0
    if device == "cuda":
        both()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    with torch.no_grad():
        forward_ms = median_ms(forward, device)
    return forward_ms, median_ms(both, device), peak


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, help="only the first N cases")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {"device": name, "torch": torch.__version__, "triton": importlib.metadata.version("triton")}
    rows = []
    print(f"{name}: milliseconds of forward, of forward+backward; peak GiB")
    for case in CASES[device][: options.cases]:
        for layer_name, layer in layers(case[2], device).items():
            forward, both, peak = measure(layer, case, device)
            print(
                f"B{case[0]} T{case[1]} d{case[2]}  {layer_name:8s} {forward:8.2f} {both:8.2f} {peak:6.2f}", flush=True
            )
            values = (layer_name, *case, f"{forward:.3f}", f"{both:.3f}", f"{peak:.3f}")
            rows.append(versions | dict(zip(FIELDS[3:], values, strict=True)))
    if options.csv:
        new = not options.csv.exists()
        with options.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if new:
                writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
