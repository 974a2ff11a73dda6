#!/usr/bin/env python
"""Times the Mixture-of-Memories layer beside what a user would pick instead, in one run.

    python tools/bench_layers.py [--cases N] [--rules] [--csv FILE]
    python tools/bench_layers.py --lengths [--csv FILE] [--plot FILE]

The layers: Mixture-of-Memories, or with --rules one memory of every update rule. Peers: softmax attention (PyTorch's),
and flash-linear-attention's MomAttention and GatedDeltaNet where that package is installed. A row is the median time of
forward and of forward+backward as the host issues them, of the latter as a CUDA graph (NaN for MomAttention, which
waits for the GPU; on a CPU both are the former), and the peak memory of forward+backward. With --lengths the cases are
one sequence of 16k to 256k tokens (fewer on a CPU), and --plot draws time and memory over the tokens. A case that runs
out of memory has a line that says so, and no row. Rows are written as they come.
"""

import importlib.util
import math
import sys

import torch
import torch.nn.functional as F
from benchmark import (
    VERSIONS,
    append_csv,
    device_kind,
    free_memory,
    graphed,
    median_ms,
    parse_options,
    peak_gib,
    plot_growth,
    tune_quickly,
    versions,
)

from mom_layers import LinearAttentionLayer, MixtureOfMemories, get_rule, rule_names

# (sequences, tokens, hidden size); 4 heads x 256, 4 memories, top-2, shared memory: the paper's 380M and 1.3B layers
CASES = {
    "cuda": [(8, 2048, 1024), (1, 16384, 1024), (1, 65536, 1024), (8, 2048, 2048), (1, 32768, 2048)],
    "cpu": [(4, 256, 256)],
}
LENGTHS = {
    "cuda": [(1, length, 1024) for length in (16384, 32768, 65536, 131072, 262144)],
    "cpu": [(1, length, 64) for length in (256, 512, 1024)],
}
HEADS = {"cuda": (4, 256), "cpu": (4, 32)}  # heads and their key size
FIELDS = (*VERSIONS, "layer", "batch", "tokens", "hidden", "forward_ms", "both_ms", "both_graph_ms", "peak_gib")


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


def layers(hidden: int, device: str, rules: bool) -> dict[str, torch.nn.Module]:
    """The layers to time, by name; ``rules``: one memory of every update rule in place of Mixture-of-Memories and
    softmax attention."""
    heads, head_dim = HEADS[device]
    if rules:
        timed = [rule for rule in rule_names() if get_rule(rule).has_kernels(head_dim, head_dim)]
        found = {rule: LinearAttentionLayer(hidden, rule, num_heads=heads, head_dim=head_dim) for rule in timed}
    else:
        found = {"mom": MixtureOfMemories(hidden, heads, head_dim), "softmax": SoftmaxAttention(hidden)}
    if device == "cuda" and importlib.util.find_spec("fla"):
        from fla.layers import GatedDeltaNet, MomAttention

        shape = {"hidden_size": hidden, "head_dim": head_dim, "num_heads": heads, "expand_v": 1, "layer_idx": 0}
        if not rules:
            found["fla-mom"] = MomAttention(num_memories=4, topk=2, shared_mem=True, **shape)
        found["fla-gdn"] = GatedDeltaNet(**shape)
    return found


def measure(layer: torch.nn.Module, case: tuple[int, int, int], device: str, graph: bool) -> tuple[float, ...]:
    """Milliseconds of forward, of forward+backward, and of that as a CUDA graph (NaN without ``graph``); peak GiB."""
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

    peak = peak_gib(both, device)
    with torch.no_grad():
        forward_ms = median_ms(forward, device)
    both_ms = graph_ms = median_ms(both, device)
    if device == "cuda":
        graph_ms = median_ms(graphed(both), device) if graph else math.nan
    return forward_ms, both_ms, graph_ms, peak


def main(argv=None) -> int:
    flags = {
        "--lengths": "one sequence of growing length instead of the cases",
        "--rules": "one memory of every update rule, without a router",
    }
    options = parse_options(__doc__, argv, plot=True, flags=flags)
    device, about = device_kind(), versions()
    tune_quickly()
    print(f"{about['device']}: milliseconds of forward, of forward+backward, of that as a CUDA graph; peak GiB")
    rows = []
    for case in (LENGTHS if options.lengths else CASES)[device][: options.cases]:
        for name, layer in layers(case[2], device, options.rules).items():
            shape = f"B{case[0]} T{case[1]} d{case[2]}  {name:16s}"
            try:
                times = measure(layer, case, device, graph=name != "fla-mom")
            except torch.OutOfMemoryError:
                print(f"{shape} out of memory", flush=True)
                continue
            finally:
                free_memory()
            print(shape, *(f"{value:8.2f}" for value in times), flush=True)
            values = (name, *case, *(f"{value:.3f}" for value in times))
            rows.append(about | dict(zip(FIELDS[len(VERSIONS) :], values, strict=True)))
            if options.csv:
                append_csv(options.csv, rows[-1:])
    if options.plot and rows:
        panels = {"both_ms": "forward+backward, ms", "peak_gib": "peak memory, GiB"}
        plot_growth(options.plot, rows, "tokens", panels, "layer", f"One layer, {about['device']}", guide=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
