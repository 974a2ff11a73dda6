#!/usr/bin/env python
"""Times the decoding of one token after a long context, and counts the bytes kept for it, beside softmax attention.

    python tools/bench_decode.py [--cases N] [--csv FILE] [--plot FILE]

"layer" is one token mixer, hidden 1024: the Mixture-of-Memories layer (4 heads x 256, 4 memories, top-2, shared) with
its state, or softmax attention (8 heads x 128) with its keys and values. "model" is 24 of them with norms and SwiGLU
layers of 2048. bf16; on a GPU the step is a CUDA graph. The memories' state comes from a real prefill of that length,
the same for every sequence of the batch; keys and values are random. Where a cache does not fit, a line says so.
"""

import sys

import torch
import torch.nn.functional as F
from benchmark import VERSIONS, append_csv, device_kind, free_memory, median_ms, parse_options, plot_growth, versions

from mom_layers import MixtureOfMemories

# what, sequences, tokens of context
CASES = {
    "cuda": [("layer", batch, length) for batch in (1, 64) for length in (1024, 32768, 131072, 524288)]
    + [("model", 1, length) for length in (1024, 32768, 131072, 524288)],
    "cpu": [("layer", 1, 64), ("layer", 1, 256), ("layer", 2, 64), ("model", 1, 64), ("model", 1, 256)],
}
# hidden size, MLP width, layers of a model, heads and their key size, width of a softmax head
SIZES = {"cuda": (1024, 2048, 24, 4, 256, 128), "cpu": (64, 128, 2, 2, 32, 32)}
PREFILL = 16384  # tokens a call
FIELDS = (*VERSIONS, "what", "mixer", "batch", "context", "ms_per_token", "bytes_per_sequence")


class Memories(torch.nn.Module):
    """The layer with a state that has seen ``context`` tokens."""

    def __init__(self, sizes: tuple, batch: int, context: int, device: str, dtype: torch.dtype):
        super().__init__()
        hidden, _, _, heads, head_dim, _ = sizes
        self.layer = MixtureOfMemories(hidden, heads, head_dim).to(device, dtype)
        state = None
        for start in range(0, context, PREFILL):
            tokens = torch.randn(1, min(PREFILL, context - start), hidden, device=device, dtype=dtype)
            _, state = self.layer(tokens, state=state, output_state=True)
        self.state = state.select(torch.zeros(batch, dtype=torch.long, device=device))
        self.kept_bytes = self.state.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.step(x, self.state)


class Attention(torch.nn.Module):
    """Softmax attention of a token to ``context`` others; its own key and value replace the last ones."""

    def __init__(self, sizes: tuple, batch: int, context: int, device: str, dtype: torch.dtype):
        super().__init__()
        hidden, head_dim = sizes[0], sizes[5]
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False, device=device, dtype=dtype)
        self.out = torch.nn.Linear(hidden, hidden, bias=False, device=device, dtype=dtype)
        shape = (batch, hidden // head_dim, context, head_dim)
        self.keys, self.values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self.kept_bytes = self.keys.nbytes + self.values.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.keys.shape[1], 1, -1).unbind(1)
        self.keys[:, :, -1:] = k
        self.values[:, :, -1:] = v
        return self.out(F.scaled_dot_product_attention(q, self.keys, self.values).flatten(1))


class Block(torch.nn.Module):
    """A mixer and a SwiGLU layer, each after a norm and added to its input."""

    def __init__(self, mixer: torch.nn.Module, sizes: tuple, device: str, dtype: torch.dtype):
        super().__init__()
        hidden, width = sizes[:2]
        self.mixer = mixer
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden, device=device, dtype=dtype) for _ in range(2))
        self.up = torch.nn.Linear(hidden, 2 * width, bias=False, device=device, dtype=dtype)
        self.down = torch.nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norms[0](x))
        gate, up = self.up(self.norms[1](x)).chunk(2, dim=1)
        return x + self.down(F.silu(gate) * up)


MIXERS = {"mom": Memories, "softmax": Attention}


def cache_bytes(what: str, batch: int, context: int, sizes: tuple, itemsize: int) -> int:
    """Of all keys and values."""
    return (sizes[2] if what == "model" else 1) * batch * context * 2 * sizes[0] * itemsize


def graphed(step, device: str):
    """The same call as a CUDA graph's replay; as it is on a CPU."""
    if device != "cuda":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def measure(what: str, mixer: str, batch: int, context: int, device: str) -> tuple[float, int]:
    """Milliseconds a token (of every sequence), and the bytes that one sequence keeps."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = SIZES[device]
    layers = [MIXERS[mixer](sizes, batch, context, device, dtype) for _ in range(sizes[2] if what == "model" else 1)]
    kept = sum(layer.kept_bytes for layer in layers) // batch
    x = torch.randn(batch, sizes[0], device=device, dtype=dtype)
    if what == "model":
        layers = [Block(layer, sizes, device, dtype) for layer in layers]
    decoder = torch.nn.Sequential(*layers)
    return median_ms(graphed(lambda: decoder(x), device), device), kept


def main(argv=None) -> int:
    options = parse_options(__doc__, argv, plot=True)
    device, about = device_kind(), versions()
    print(f"{about['device']}: milliseconds a token; KiB kept for a sequence")
    rows = []
    for what, batch, context in CASES[device][: options.cases]:
        for mixer in MIXERS:
            shape = f"{what} B{batch} after {context:6d}  {mixer:8s}"
            needed = cache_bytes(what, batch, context, SIZES[device], 2)
            if mixer == "softmax" and device == "cuda" and needed > 0.9 * torch.cuda.mem_get_info()[0]:
                print(f"{shape} does not fit: {needed / 2**30:.0f} GiB of keys and values", flush=True)
                continue
            time, kept = measure(what, mixer, batch, context, device)
            free_memory()
            print(f"{shape} {time:8.4f} {kept / 1024:12.0f}", flush=True)
            values = (what, mixer, batch, context, f"{time:.5f}", kept)
            rows.append(about | dict(zip(FIELDS[len(VERSIONS) :], values, strict=True)))
    if options.csv and rows:
        append_csv(options.csv, rows)
    if options.plot and rows:
        drawn = [row | {"line": f"{row['mixer']}, {row['what']}, batch {row['batch']}"} for row in rows]
        panels = {"ms_per_token": "ms a token", "bytes_per_sequence": "bytes kept a sequence"}
        plot_growth(options.plot, drawn, "context", panels, "line", f"Decoding, {about['device']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
