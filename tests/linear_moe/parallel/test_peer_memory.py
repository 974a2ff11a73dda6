"""Pulls out of peers' memory: a whole layer whose ranks are threads of one process.

On GPUs `tools/bench_exchanges.py --check` runs a layer in processes, over NVLink.
"""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from split_layer import Layer

from linear_moe.parallel import all_ranks, expert
from linear_moe.parallel.peer_memory import PeerBuffer, PeerBuffers, PeerMemory
from linear_moe.parallel.peer_memory_triton import pull_rows


class Ranks:
    """The ranks of a group as threads: a gather, and buffers that all threads can read."""

    def __init__(self, size):
        self.size, self.barrier, self.lock = size, threading.Barrier(size, timeout=60), threading.Lock()
        self.given, self.buffers = [None] * size, {}

    def gather(self, rank, x):
        self.given[rank] = x
        self.barrier.wait()
        gathered = torch.cat(self.given)
        self.barrier.wait()
        return gathered

    def buffer(self, rank, kind, rows, channels, dtype, device):
        with self.lock:
            shape = (self.size, rows, channels)
            buffers = self.buffers.setdefault((kind, *shape, dtype), torch.full(shape, torch.nan, dtype=dtype))
        pointers = torch.tensor([buffer.data_ptr() for buffer in buffers])
        return PeerBuffer(buffers[rank], pointers, self.barrier.wait)


class Member:
    """What a rank sees of its group."""

    def __init__(self, ranks, rank):
        self.ranks, self._rank = ranks, rank

    def size(self):
        return self.ranks.size

    def rank(self):
        return self._rank


KINDS = {
    "ragged documents": {},
    "one memory takes all tokens": {"kind": "one", "shared": False},
    "sequences of one length, stored time first": {"kind": "regular"},
    "one projection for all memories": {"single": True},
}


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("case", KINDS)
def test_ranks_that_read_each_other_compute_what_one_computes(ranks, case, monkeypatch):
    group = Ranks(ranks)
    monkeypatch.setattr(all_ranks, "gather", lambda x, member: member.ranks.gather(member.rank(), x))

    def made_by(choices):
        return PeerMemory(choices, partial(choices.group.ranks.buffer, choices.group.rank()))

    monkeypatch.setitem(expert.EXCHANGES, "peer-memory", made_by)
    # Triton's interpreter runs one kernel at a time.
    interpreter = threading.Lock()

    def pull_alone(*arguments):
        with interpreter:
            return pull_rows(*arguments)

    monkeypatch.setattr("linear_moe.parallel.peer_memory_triton.pull_rows", pull_alone)

    def run(rank):
        layer = Layer(ranks, "peer-memory", **KINDS[case])
        data = layer.inputs(rank)
        y = expert.mix_memories_over_ranks(
            data.x, data.q, data.gate, data.mix, layer.choices(data, Member(group, rank)), layer.routed(rank),
            layer.shared_parameters(), exchange="peer-memory",
        )  # fmt: skip
        return layer.gradients(y, data)

    with ThreadPoolExecutor(ranks) as pool:
        results = [future.result() for future in [pool.submit(run, rank) for rank in range(ranks)]]
    summed = [sum(result[i] for result in results) for i in range(len(results[0]))]
    layer = Layer(ranks, "peer-memory", **KINDS[case])
    layer.compare([[*result[: layer.OWN], *summed[layer.OWN :]] for result in results], case)


def test_buffers_go_with_the_last_layer_that_holds_them(monkeypatch):
    made = []

    def make(*shape_and_group):
        made.append(shape_and_group[-1])
        return PeerBuffer(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64), lambda: None)

    monkeypatch.setattr("linear_moe.parallel.peer_memory.symmetric_buffer", make)
    first, second = Member(None, 0), Member(None, 0)
    shape = ("tokens", 2, 3, torch.float32, torch.device("cpu"))
    layers = [PeerBuffers.of(first), PeerBuffers.of(first)]
    rows = weakref.ref(layers[0].buffer(*shape).rows)
    assert layers[1].buffer(*shape).rows is rows() and made == [first]
    assert PeerBuffers.of(second) is not layers[0]
    layers.pop()
    gc.collect()
    assert rows() is not None
    layers.clear()
    gc.collect()
    assert rows() is None
    held = PeerBuffers.of(first)
    held.buffer(*shape)
    assert made == [first, first]
