#!/usr/bin/env python
"""Checks and times the exchanges of tokens between expert-parallel ranks, in one layer.

    torchrun --standalone --nproc-per-node 2 tools/bench_exchanges.py [--check] [--csv FILE]

A row is the median time of forward+backward of the memories of one layer, as the host issues it and as a CUDA graph's
replay, the calls in it that wait for the GPU, and the peak memory. "one" is a rank that has all memories and exchanges
nothing. With --check every exchange is compared with "one" first, in float32, with sequences of one length, packed
documents, and one memory that takes all tokens; and a CUDA graph that was captured with one routing is replayed with
others. Without a GPU the exchanges run over gloo, at small sizes and without graphs.
"""

import argparse
import logging
import os
import statistics
import sys
import time
import traceback
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist
from benchmark import VERSIONS, append_csv, device_kind, free_memory, versions

from linear_moe.commands.values import path as a_path
from linear_moe.commands.values import whole
from linear_moe.entry.machine import prepare_machine
from mom_layers.mixing import MemoryParameters, mix_routed
from mom_layers.recur.rules import get_rule
from mom_layers.settings import MixerSettings

# Sequences and tokens of a micro-batch: the 380M recipe's on a GPU.
SIZES = {
    "cuda": {"batch": 16, "tokens": 2048, "hidden": 1024, "heads": 4, "head_dim": 256},
    "cpu": {"batch": 2, "tokens": 64, "hidden": 32, "heads": 2, "head_dim": 16},
}
CHECKED = {"batch": 2, "tokens": 300, "hidden": 128, "heads": 2, "head_dim": 64}
GRAPHED = {"batch": 2, "tokens": 300}
KINDS = ("sequences of one length", "packed documents", "one memory takes all tokens")
TOLERANCE = 2e-5  # of outputs and gradients in float32; gates' gradients are differences of larger sums
GATE_TOLERANCE = 5e-4
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy", "aten::item")
FIELDS = (*VERSIONS, "ranks", "exchange", "batch", "tokens", "hidden", "memories", "topk")
FIELDS += ("both_ms", "both_graph_ms", "waits", "peak_gib")


class Layer:
    """The memories of one layer on this rank: weights, inputs of a kind, and a step forward and backward."""

    def __init__(self, sizes, kind, dtype, options, seed=0):
        from linear_moe.parallel.peer_memory import PeerBuffers

        self.peer_buffers = PeerBuffers.of(dist.group.WORLD)  # held, so that a graph's buffers stay
        self.group, self.device = dist.group.WORLD, f"cuda:{torch.cuda.current_device()}" if CUDA else "cpu"
        self.kind, self.sizes, self.options = kind, SimpleNamespace(**sizes), options
        rule, heads, size = get_rule("gated_deltanet"), sizes["heads"], sizes["head_dim"]
        random = torch.Generator().manual_seed(0)

        def draw(*shape, scale=0.3, kind=dtype):
            return (scale * torch.randn(*shape, generator=random)).to(self.device, kind).requires_grad_()

        hidden, memories = sizes["hidden"], options.memories
        scale = hidden**-0.5
        self.weights = {
            "projection": draw(memories + 1, sum(rule.projection_sizes(heads, size, size)), hidden, scale=scale),
            "q_conv": draw(heads * size, 4),
            "k_conv": draw(heads * size, 4),
            "v_conv": draw(heads * size, 4),
            "norm_weight": draw(size),
        }
        self.own = {name: draw(heads, kind=torch.float32) for name in rule.parameter_names}
        self.settings = MixerSettings(heads, size, 1.0, num_memories=memories, topk=options.topk)
        tokens = sizes["batch"] * sizes["tokens"]
        widths = (hidden, heads * size, heads * size)
        self.x, self.q, self.gate = (
            torch.empty(tokens, width, device=self.device, dtype=dtype, requires_grad=True) for width in widths
        )
        topk = 1 if kind == KINDS[2] else options.topk
        self.mix = torch.empty(tokens, topk, device=self.device, requires_grad=True)
        self.ids = torch.empty(tokens, topk, device=self.device, dtype=torch.int64)
        self.dy = torch.empty(tokens, heads * size, device=self.device, dtype=dtype)
        self.borders = torch.arange(0, tokens + 1, sizes["tokens"], dtype=torch.int32, device=self.device)
        if kind == KINDS[1]:  # another number of documents on every rank
            cuts = torch.randperm(tokens - 1, generator=torch.Generator().manual_seed(dist.get_rank()))
            cuts = cuts[: 3 + dist.get_rank()].sort().values + 1
            self.borders = torch.tensor([0, *cuts.tolist(), tokens], dtype=torch.int32, device=self.device)
        self.draw_inputs(seed)

    @torch.no_grad()
    def draw_inputs(self, seed):
        """New tokens and a new routing, in the same tensors."""
        random = torch.Generator().manual_seed(100 * seed + dist.get_rank())
        for tensor in (self.x, self.q, self.gate, self.dy):
            tensor.copy_(torch.randn(tensor.shape, generator=random))
        self.mix.copy_(torch.rand(self.mix.shape, generator=random).softmax(1))
        choices = 1 if self.kind == KINDS[2] else self.options.memories
        ids = torch.rand(len(self.ids), choices, generator=random).argsort(1)
        self.ids.copy_(ids[:, : self.ids.shape[1]])

    @property
    def time_major(self):
        return self.kind == KINDS[0]

    def parameters(self, projection):
        return MemoryParameters(self.settings, rule_parameters=self.own, **(self.weights | {"projection": projection}))

    def step(self, exchange) -> dict[str, torch.Tensor]:
        """y, and the gradients of all inputs and weights, of this rank."""
        from linear_moe.parallel.choices import Choices
        from linear_moe.parallel.expert import mix_memories_over_ranks

        whole, (ranks, rank) = self.weights["projection"], (dist.get_world_size(), dist.get_rank())
        if exchange == "one":
            settings = self.parameters(whole)
            y, _ = mix_routed(
                self.x, self.q, self.gate, self.mix, self.ids, self.borders, settings, time_major=self.time_major
            )
        else:
            here = self.options.memories // ranks
            choices = Choices(
                self.ids, self.borders, num_memories=self.options.memories, group=self.group,
                most_sequences=ranks + 3 if self.kind == KINDS[1] else self.borders.shape[0] - 1,
                ragged=not self.time_major, time_major=self.time_major,
            )  # fmt: skip
            y = mix_memories_over_ranks(
                self.x, self.q, self.gate, self.mix, choices, self.parameters(whole[rank * here : (rank + 1) * here]),
                self.parameters(whole[-1:]), exchange=exchange,
            )  # fmt: skip
        inputs = {"x": self.x, "q": self.q, "gate": self.gate, "mix": self.mix, **self.weights, **self.own}
        return {"y": y.detach()} | dict(
            zip(inputs, torch.autograd.grad(y, list(inputs.values()), self.dy, allow_unused=True), strict=True)
        )

    def summed(self, exchange):
        """The same, with the weights' gradients summed over ranks."""
        results = self.step(exchange)
        for name in (*self.weights, *self.own):
            dist.all_reduce(results[name])
        return results


CUDA = torch.cuda.is_available()


STARTED = time.monotonic()


def say(*words):
    """Prints a line with the seconds since the start, on the first rank."""
    if dist.get_rank() == 0:
        print(f"{time.monotonic() - STARTED:5.1f} s ", *words, flush=True)


def difference(got, expected) -> tuple[float, str]:
    """The largest relative difference over its tolerance, on any rank, and what differs."""
    worst = (0.0, "")
    for name, tensor in expected.items():
        error = float((got[name].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-30))
        tolerance = GATE_TOLERANCE if name in ("A_log", "dt_bias") else TOLERANCE
        if tensor.dtype == torch.bfloat16:
            tolerance = 2e-2
        worst = max(worst, (error / tolerance if error == error else float("inf"), f"{name} by {error:.1e}"))
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, worst)
    return max(every)


@contextmanager
def nan_in_fresh_memory():
    """torch.empty is filled with NaN, so that an element shows that no kernel wrote."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def exchanges() -> list[str]:
    from linear_moe.parallel.expert import EXCHANGES

    return [name for name in EXCHANGES if CUDA or name != "peer-memory"]


def check(name, options) -> bool:
    """Whether an exchange computes what one rank computes."""
    right = True
    for kind in KINDS:
        layer = Layer(CHECKED if CUDA else SIZES["cpu"], kind, torch.float32, options)
        expected = layer.summed("one")
        with nan_in_fresh_memory():
            worst, where = difference(layer.summed(name), expected)
        right &= worst <= 1
        say("right" if worst <= 1 else "WRONG", f"{name}, {kind}: {where} at most, {worst:.2f} of what is allowed")
    return right


def capture(layer, exchange):
    """A CUDA graph of a step, and the results that its replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            layer.step(exchange)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = layer.step(exchange)
    return graph, results


def check_graph(name, options) -> bool:
    """Whether a graph of a step computes other routings than the captured one as the host issues the step."""
    right = True
    layer = Layer(SIZES["cuda"] | GRAPHED, KINDS[0], torch.bfloat16, options)
    graph, results = capture(layer, name)
    for seed in (1, 2):
        layer.draw_inputs(seed)
        expected = {key: tensor.clone() for key, tensor in layer.step(name).items()}
        graph.replay()
        torch.cuda.synchronize()
        worst, where = difference(results, expected)
        right &= worst <= 1
        say("right" if worst <= 1 else "WRONG", f"{name}, graph with routing {seed}: {where} at most")
    return right


def milliseconds(step) -> float:
    """The median over ranks' common steps; every rank makes the same number of them."""
    for _ in range(3):
        step()
    times = []
    for _ in range(12):
        if CUDA:
            torch.cuda.synchronize()
        dist.barrier()
        start = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def many_ms(step, count=8) -> float:
    """Time of a step where the host issues several without waiting."""

    def steps():
        for _ in range(count):
            step()

    return milliseconds(steps) / count


def waits_of(step) -> Counter:
    """Calls of a step that wait for the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
    found = Counter(event.name for event in trace.events() if event.name in WAITS)
    found.update("Memcpy DtoH" for event in trace.events() if event.name.startswith("Memcpy DtoH"))
    return found


def measure(name, options) -> dict:
    """A row of the CSV file, and its line on the screen."""
    sizes = SIZES[device_kind()]
    layer = Layer(sizes, KINDS[0], torch.bfloat16 if CUDA else torch.float32, options)

    def step():
        layer.step(name)

    step()
    both, graph_ms, waits, peak = many_ms(step), float("nan"), Counter(), 0.0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30
        waits = waits_of(step)
        waits.pop("cudaDeviceSynchronize", None)  # the profiler's own, at its end
        if name != "all-to-all":  # whose sizes the host reads
            graph, _ = capture(layer, name)
            graph_ms = many_ms(graph.replay)
    about = (dist.get_world_size(), name, sizes["batch"], sizes["tokens"], sizes["hidden"])
    about += (options.memories, options.topk)
    numbers = (f"{both:.3f}", f"{graph_ms:.3f}", sum(waits.values()), f"{peak:.2f}")
    say(f"{name:12} {both:8.2f} ms, as a graph {graph_ms:8.2f} ms, {peak:.2f} GiB, waits: {dict(waits) or 'none'}")
    return versions() | dict(zip(FIELDS[len(VERSIONS) :], about + numbers, strict=True))


def all_of(name, options) -> tuple[bool, dict | None]:
    """Whether one exchange is right, and its row; an exchange that fails on all ranks does not stop the others."""
    right, row = True, None
    try:
        if options.check and name != "one":
            right = check(name, options)
            if CUDA and name != "all-to-all":
                right &= check_graph(name, options)
                free_memory()
        row = measure(name, options)
    except Exception:
        say(f"FAILED {name}\n{traceback.format_exc()}")
        right = False
    free_memory()
    return right, row


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with one rank first, and replay graphs")
    parser.add_argument("--memories", type=whole(1), default=4, help="memories of all ranks together; 4")
    parser.add_argument("--topk", type=whole(1), default=2, help="memories of a token; 2")
    parser.add_argument("--csv", type=a_path, metavar="FILE", help="append the rows to this file")
    options = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start this tool with torchrun --standalone --nproc-per-node N, which gives every rank its number")
    if options.memories % int(os.environ["WORLD_SIZE"]):
        parser.error(f"--memories {options.memories} does not divide over {os.environ['WORLD_SIZE']} ranks")
    logging.getLogger("megatron_patches").setLevel(logging.WARNING)
    prepare_machine()
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if CUDA else "gloo")
    try:
        done = [all_of(name, options) for name in ("one", *exchanges())]
        rows = [row for _, row in done if row is not None]
        if options.csv and dist.get_rank() == 0 and rows:
            append_csv(options.csv, rows)
    finally:
        dist.destroy_process_group()
    return 0 if all(right for right, _ in done) else 1


if __name__ == "__main__":
    sys.exit(main())
