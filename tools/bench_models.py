#!/usr/bin/env python
"""Times a training step of the paper's 380M model beside flash-linear-attention's, in one run.

    python tools/bench_models.py [--csv FILE]

Both are Hugging Face models of one configuration with random weights: 24 layers, hidden 1024, SwiGLU 2048, 4 heads x
256, 4 memories, top-2, shared memory, 32000 tokens in the vocabulary, embedding and output layer tied as in the recipe;
8 sequences of 2048 tokens, bf16. A step is forward, loss, backward and a fused AdamW step. A row is its median time,
tokens a second, the peak memory beyond weights and optimizer state, and how long the very first step took, which
compiles every kernel: Triton's cache starts empty. flash-linear-attention's model appears where that package is
installed. Without a GPU a model of two layers shows that the tool runs.
"""

import importlib.util
import os
import sys
import tempfile
import time

import torch
from benchmark import (
    VERSIONS,
    append_csv,
    device_kind,
    free_memory,
    median_ms,
    parse_options,
    peak_gib,
    tune_quickly,
    versions,
)

# what both configurations take
SIZES = {
    "cuda": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 2048, "num_heads": 4, "head_dim": 256},
    "cpu": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_heads": 2, "head_dim": 32},
}
BATCH = {"cuda": (8, 2048), "cpu": (2, 64)}  # sequences, tokens
VOCABULARY = {"cuda": 32000, "cpu": 128}
FIELDS = (*VERSIONS, "model", "parameters", "batch", "tokens")
FIELDS += ("step_ms", "tokens_per_second", "peak_gib", "first_step_s")


def models(device: str) -> dict:
    """Functions that build a model, by name."""
    from mom_layers.hf.configuration_mom import MomConfig
    from mom_layers.hf.modeling_mom import MomForCausalLM

    sizes = SIZES[device] | {"vocab_size": VOCABULARY[device], "tie_word_embeddings": True}
    found = {"mom": lambda: MomForCausalLM(MomConfig(**sizes))}
    if device == "cuda" and importlib.util.find_spec("fla"):
        import fla.models

        found["fla-mom"] = lambda: fla.models.MomForCausalLM(fla.models.MomConfig(**sizes))
    return found


def measure(build, device: str) -> tuple[int, float, float, float]:
    """Parameters; a step's milliseconds, its peak GiB, and the seconds of the first one."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    model = build().to(device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device == "cuda")
    tokens = torch.randint(VOCABULARY[device], BATCH[device], device=device)

    def step():
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    start = time.perf_counter()
    loss = step().item()  # waits for the device
    first = time.perf_counter() - start
    if not loss < 100:
        raise RuntimeError(f"the loss of the first step is {loss}")
    peak = peak_gib(step, device)
    return sum(p.numel() for p in model.parameters()), median_ms(step, device, repeat_ms=3000), peak, first


def main(argv=None) -> int:
    options = parse_options(__doc__, argv)
    device, about = device_kind(), versions()
    tune_quickly()
    batch, length = BATCH[device]
    print(
        f"{about['device']}: {batch} x {length} tokens; milliseconds a step, tokens/s, peak GiB, first step in seconds"
    )
    with tempfile.TemporaryDirectory(prefix="bench-models-") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for name, build in list(models(device).items())[: options.cases]:
            try:
                parameters, step_ms, peak, first = measure(build, device)
            except torch.OutOfMemoryError:
                print(f"{name:8s} out of memory", flush=True)
                continue
            finally:
                free_memory()
            speed = batch * length / step_ms * 1e3
            numbers = f"{parameters / 1e6:6.1f}M {step_ms:8.1f} {speed:9.0f} {peak:6.2f} {first:6.1f}"
            print(f"{name:8s} {numbers}", flush=True)
            values = (name, parameters, batch, length, f"{step_ms:.2f}", f"{speed:.0f}", f"{peak:.3f}", f"{first:.2f}")
            if options.csv:
                append_csv(options.csv, [about | dict(zip(FIELDS[len(VERSIONS) :], values, strict=True))])
    return 0


if __name__ == "__main__":
    sys.exit(main())
