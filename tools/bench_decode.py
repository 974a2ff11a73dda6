#!/usr/bin/env python
"""Times the decoding of one token after a long context, and counts the bytes kept for it, beside softmax attention.

    python tools/bench_decode.py [--cases N] [--csv FILE] [--plot FILE]

mom-layer is the Mixture-of-Memories layer, hidden 1024, 4 heads x 256, 4 memories, top-2, shared, that steps in place;
softmax-layer is attention of 8 heads x 128 over all keys and values. mom-model and softmax-model have 24 such layers in
one class of Hugging Face model: norms, SwiGLU layers of 2048, 32000 tokens in the vocabulary. bf16, random weights. The
sizes are the same and the weights are not: the column "parameters" counts them, all memories included.

A row is the median time of one token of every sequence as a CUDA graph and as the host issues it (on a CPU both are
the latter), tokens a second of the whole batch with the graph, and the bytes that one sequence keeps. A
memory's state comes from a prefill of that many tokens, the same for every sequence of the batch; keys and values are
random. Keys and values that do not fit are not allocated: a line says so. Rows are written as they come.
"""

import sys
import time
from collections.abc import Callable

import psutil
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
    plot_growth,
    versions,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicLayer

from mom_layers import MixtureOfMemories
from mom_layers.hf import MomCache, MomConfig, MomForCausalLM

CONTEXTS = {"cuda": (1024, 32768, 131072, 524288), "cpu": (64, 256)}
# what, sequences, tokens of context
CASES = {
    device: [("layer", batch, context) for batch in batches for context in CONTEXTS[device]]
    + [("model", 1, context) for context in CONTEXTS[device]]
    for device, batches in {"cuda": (1, 64), "cpu": (1, 2)}.items()
}
# of MomConfig; hidden_size, num_heads and head_dim are the layer's too
SIZES = {
    "cuda": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2048, "num_heads": 4, "head_dim": 256},
    "cpu": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_heads": 2, "head_dim": 32},
}
VOCABULARY = {"cuda": 32000, "cpu": 128}
SOFTMAX_HEAD_DIM = {"cuda": 128, "cpu": 32}
DTYPE = {"cuda": torch.bfloat16, "cpu": torch.float32}
MIXERS = ("mom", "softmax")
PREFILL = 16384  # tokens a call
USABLE = 0.9  # of the free memory; the rest is for weights and what a step computes
# Flash attention splits one query's keys over the GPU; the kernels that PyTorch prefers for training may not.
ATTENTION_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FIELDS = (*VERSIONS, "what", "parameters", "batch", "context")
FIELDS += ("ms_per_token", "eager_ms_per_token", "tokens_per_second", "state_bytes_per_sequence")


class FilledKeys(DynamicLayer):
    """Random keys and values [B, heads, context, head_dim] of a whole context, the newest token's written by each step.

    A cache that grows by copying would be timed for its copies, and a CUDA graph could not hold it.
    """

    def __init__(self, batch: int, context: int, device: str):
        super().__init__()
        head_dim = SOFTMAX_HEAD_DIM[device]
        shape = (batch, SIZES[device]["hidden_size"] // head_dim, context, head_dim)
        self.keys, self.values = (torch.randn(shape, device=device, dtype=DTYPE[device]) for _ in range(2))
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Tokens before the one that the step brings."""
        return self.keys.shape[2] - 1

    def update(self, key_states, value_states, *args, **kwargs):
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values


class SoftmaxAttention(torch.nn.Module):
    """Softmax attention of one token of every sequence, x [B, D], to all keys that ``cache`` holds."""

    def __init__(self, hidden: int, head_dim: int):
        super().__init__()
        self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = torch.nn.Linear(hidden, hidden, bias=False)
        self.head_dim = head_dim

    def forward(self, x: torch.Tensor, cache: FilledKeys) -> torch.Tensor:
        q, k, v = self.qkv(x).view(x.shape[0], 3, -1, 1, self.head_dim).unbind(1)
        return self.out(F.scaled_dot_product_attention(q, *cache.update(k, v)).flatten(1))


def prepare_layer(mixer: str, batch: int, context: int, device: str) -> tuple[Callable, int, int]:
    """A decoding step of one layer, its parameters, and the bytes kept for the whole batch."""
    sizes, kind = SIZES[device], {"device": device, "dtype": DTYPE[device]}
    hidden = sizes["hidden_size"]
    x = torch.randn(batch, hidden, **kind)
    if mixer == "softmax":
        layer = SoftmaxAttention(hidden, SOFTMAX_HEAD_DIM[device]).to(**kind)
        cache = FilledKeys(batch, context, device)
        return lambda: layer(x, cache), count(layer), cache.keys.nbytes + cache.values.nbytes
    layer = MixtureOfMemories(hidden, sizes["num_heads"], sizes["head_dim"]).to(**kind)
    state = None
    for start in range(0, context, PREFILL):
        tokens = torch.randn(1, min(PREFILL, context - start), hidden, **kind)
        _, state = layer(tokens, state=state, output_state=True)
    state = state.select(torch.zeros(batch, dtype=torch.long, device=device))
    return lambda: layer.step(x, state), count(layer), state.nbytes


def prepare_model(mixer: str, batch: int, context: int, device: str) -> tuple[Callable, int, int]:
    """A decoding step of a whole model, its parameters, and the bytes kept for the whole batch."""
    sizes, vocabulary = SIZES[device], VOCABULARY[device]
    layers = range(sizes["num_hidden_layers"])
    attn = {"layers": list(layers), "num_heads": sizes["hidden_size"] // SOFTMAX_HEAD_DIM[device]}
    config = MomConfig(vocab_size=vocabulary, attn=attn if mixer == "softmax" else None, **sizes)
    with torch.device(device):
        model = MomForCausalLM(config).eval().to(DTYPE[device])
    cache = MomCache(config)
    if mixer == "softmax":
        cache.layers = [FilledKeys(batch, context, device) for _ in layers]
    else:
        for start in range(0, context, PREFILL):
            tokens = torch.randint(vocabulary, (1, min(PREFILL, context - start)), device=device)
            model(tokens, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(batch)
    token = torch.randint(vocabulary, (batch, 1), device=device)
    return lambda: model(token, past_key_values=cache).logits, count(model), cache.nbytes


PREPARE = {"layer": prepare_layer, "model": prepare_model}


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def key_bytes(what: str, batch: int, context: int, device: str) -> int:
    """Of all keys and values of softmax attention."""
    layers = SIZES[device]["num_hidden_layers"] if what == "model" else 1
    return layers * batch * context * 2 * SIZES[device]["hidden_size"] * DTYPE[device].itemsize


def free_bytes(device: str) -> int:
    """Memory that nothing holds."""
    return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available


def eager_ms(step: Callable, device: str, calls: int = 50) -> float:
    """Milliseconds a call that the host issues.

    On a GPU it is the mean of calls one after another, for the median's timer gives the host a head start.
    """
    if device == "cpu":
        return median_ms(step, device)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / calls


@torch.no_grad()
def measure(what: str, mixer: str, batch: int, context: int, device: str) -> tuple[int, float, float, int]:
    """Parameters; milliseconds of a step as a graph and as the host issues it; the bytes that one sequence keeps."""
    torch.manual_seed(0)
    with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
        step, parameters, kept = PREPARE[what](mixer, batch, context, device)
        eager = eager_ms(step, device)
        return parameters, median_ms(graphed(step), device) if device == "cuda" else eager, eager, kept // batch


def main(argv=None) -> int:
    options = parse_options(__doc__, argv, plot=True)
    device, about = device_kind(), versions()
    print(f"{about['device']}: milliseconds a token with a CUDA graph and without; tokens/s; KiB kept for a sequence")
    rows = []
    for what, batch, context in CASES[device][: options.cases]:
        for mixer in MIXERS:
            name = f"{mixer}-{what}"
            shape = f"{name:13s} B{batch:<2d} after {context:6d}"
            needed, free = key_bytes(what, batch, context, device), free_bytes(device)
            if mixer == "softmax" and needed > USABLE * free:
                print(f"{shape} does not fit: {needed / 2**30:.2f} GiB of keys and values, {free / 2**30:.2f} are free")
                continue
            try:
                parameters, graph, eager, kept = measure(what, mixer, batch, context, device)
            except torch.OutOfMemoryError:
                print(f"{shape} out of memory", flush=True)
                continue
            finally:
                free_memory()
            speed = batch / graph * 1e3
            print(f"{shape} {graph:9.4f} {eager:9.4f} {speed:10.1f} {kept / 1024:12.0f}", flush=True)
            values = (name, parameters, batch, context, f"{graph:.5f}", f"{eager:.5f}", f"{speed:.2f}", kept)
            rows.append(about | dict(zip(FIELDS[len(VERSIONS) :], values, strict=True)))
            if options.csv:
                append_csv(options.csv, rows[-1:])
    if options.plot and rows:
        drawn = [row | {"line": f"{row['what']}, batch {row['batch']}"} for row in rows]
        panels = {"ms_per_token": "time a token, ms", "state_bytes_per_sequence": "kept for a sequence, bytes"}
        title = f"Decoding one token of every sequence, {about['device']}"
        plot_growth(options.plot, drawn, "context", panels, "line", title, x_label="context, tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
