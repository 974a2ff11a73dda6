"""Routing metrics against counts by hand, in one process and summed over two."""

import math
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import warm_python
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func

from linear_moe.watching.metrics import MemoryMetrics, memory_metrics, scalars, summarize, write

LAYERS, MEMORIES = 3, 4


def routing_map(*tokens):
    """One row a token, given the memories it goes to."""
    rows = torch.zeros(len(tokens), MEMORIES, dtype=torch.bool)
    for row, memories in zip(rows, tokens, strict=True):
        row[list(memories)] = True
    return rows


def entropy(logits):
    weights = [math.exp(x) for x in logits]
    return -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights)


def report_of(metrics):
    return summarize(metrics.collect(LAYERS, MEMORIES))


def test_loads_and_entropy_by_hand():
    metrics = MemoryMetrics()
    uniform = torch.zeros(2, MEMORIES)
    decided = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.bfloat16)
    metrics.record_routing(1, routing_map((0, 1), (0, 2)), uniform)
    metrics.record_routing(3, routing_map((0, 1)), decided)
    metrics.record_routing(3, routing_map((2, 3), (2, 3), (2, 1)), torch.zeros(3, MEMORIES))
    report = report_of(metrics)
    assert report["load"] == {1: [0.5, 0.25, 0.25, 0], 3: [1 / 8, 2 / 8, 3 / 8, 2 / 8]}
    assert report["entropy"][1] == pytest.approx(math.log(4))
    assert report["entropy"][3] == pytest.approx((entropy([2, 1, 0, -1]) + 3 * math.log(4)) / 4)
    assert (report["load_min"], report["load_max"]) == (0, 0.5)
    assert report["load_balancing_loss"] is None and report["z_loss"] is None


def test_collect_starts_afresh_and_its_results_add_up():
    metrics = MemoryMetrics()
    choices = [routing_map((0, 1)), routing_map((2, 3), (2, 3), (0, 3))]
    parts = []
    for part in choices:
        metrics.record_routing(2, part, torch.zeros(len(part), MEMORIES))
        parts.append(metrics.collect(LAYERS, MEMORIES))
    assert summarize(parts[1])["load"] == {2: [1 / 6, 0, 2 / 6, 3 / 6]}
    assert summarize(parts[0] + parts[1])["load"] == {2: [2 / 8, 1 / 8, 2 / 8, 3 / 8]}
    assert report_of(metrics)["load"] == {}


def test_losses_are_means_over_layers_and_passes():
    metrics = MemoryMetrics()
    for layer, balancing, z in [(1, 1.0, 2.0), (1, 2.0, 4.0), (3, 1.25, 0.5), (3, 1.25, 0.5)]:
        metrics.record_routing(layer, routing_map((0, 1)), torch.zeros(1, MEMORIES))
        metrics.losses.record("load_balancing_loss", torch.tensor(balancing), layer, LAYERS)
        metrics.losses.record("z_loss", torch.tensor(z), layer, LAYERS)
    report = report_of(metrics)
    assert report["load_balancing_loss"] == pytest.approx((1.5 + 1.25) / 2)
    assert report["z_loss"] == pytest.approx((3.0 + 0.5) / 2)
    assert report_of(metrics)["z_loss"] is None


def test_nothing_recorded():
    report = report_of(MemoryMetrics())
    assert report["load"] == report["entropy"] == {}
    assert report["load_min"] is report["load_max"] is report["load_balancing_loss"] is report["z_loss"] is None
    assert scalars(report) == {}


def test_recording_does_not_wait_for_the_device():
    metrics = MemoryMetrics()
    logits = torch.zeros(5, MEMORIES, device="meta", requires_grad=True)  # a meta tensor has no value to read
    metrics.record_routing(1, torch.zeros(5, MEMORIES, dtype=torch.bool, device="meta"), logits)


def test_a_model_of_another_size_replaces_the_last_one():
    metrics = MemoryMetrics()
    metrics.record_routing(1, torch.ones(2, 8, dtype=torch.bool), torch.zeros(2, 8))
    metrics.record_routing(1, routing_map((0, 1)), torch.zeros(1, MEMORIES))
    assert report_of(metrics)["load"] == {1: [0.5, 0.5, 0, 0]}


def balancing_loss(probabilities, choices, topk=2):
    return switch_load_balancing_loss_func(
        probabilities, choices.sum(0).float(), len(choices), topk, MEMORIES, moe_aux_loss_coeff=1.0
    ).item()


def test_what_the_balancing_loss_is():
    uniform = torch.full((4, MEMORIES), 1 / MEMORIES)
    assert balancing_loss(uniform, routing_map(*[(0, 1)] * 4)) == pytest.approx(1)
    balanced = routing_map((0, 1), (2, 3), (0, 2), (1, 3))
    assert balancing_loss(torch.rand(4, MEMORIES).softmax(1), balanced) == pytest.approx(1)
    sure = torch.tensor([[0.5, 0.5, 0, 0]]).repeat(4, 1)
    assert balancing_loss(sure, routing_map(*[(0, 1)] * 4)) == pytest.approx(MEMORIES / 2)


class Writer:
    def __init__(self):
        self.values = {}

    def add_scalar(self, name, value, iteration):
        self.values[name, iteration] = value


def test_scalars_and_write():
    metrics = MemoryMetrics()
    metrics.record_routing(3, routing_map((0, 1), (0, 3)), torch.zeros(2, MEMORIES))
    metrics.losses.record("load_balancing_loss", torch.tensor(1.5), 3, LAYERS)
    values = scalars(report_of(metrics))
    assert values == {
        "mom/load/layer_03/memory_0": 0.5,
        "mom/load/layer_03/memory_1": 0.25,
        "mom/load/layer_03/memory_2": 0.0,
        "mom/load/layer_03/memory_3": 0.25,
        "mom/entropy/layer_03": pytest.approx(math.log(4)),
        "mom/load_max": 0.5,
        "mom/load_balancing_loss": 1.5,
    }
    writer, logged = Writer(), []
    wandb = type("Wandb", (), {"log": lambda self, values, step: logged.append((values, step))})()
    write(values, 20, writer, wandb)
    assert writer.values == {(name, 20): value for name, value in values.items()}
    assert logged == [(values, 20)]
    write(values, 20, None, None)


def test_memory_metrics_is_one_object():
    assert memory_metrics() is memory_metrics()


def record(metrics, layer, choices, balancing, z, group=None):
    metrics.record_routing(layer, choices, torch.zeros(len(choices), MEMORIES))
    metrics.losses.record("load_balancing_loss", torch.tensor(balancing), layer, LAYERS, reduce_group=group)
    metrics.losses.record("z_loss", torch.tensor(z), layer, LAYERS)


def two_processes(rank, store):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    try:
        metrics = MemoryMetrics()

        # Data parallel: other tokens on each.
        record(metrics, 1, [routing_map((0, 1)), routing_map((2, 3), (1, 3))][rank], [1.0, 1.4][rank], [2.0, 4.0][rank])
        report = report_of(metrics)
        assert report["load"] == {1: pytest.approx([1 / 6, 2 / 6, 1 / 6, 2 / 6])}
        assert report["entropy"] == {1: pytest.approx(math.log(4))}
        assert report["load_balancing_loss"] == pytest.approx(1.2) and report["z_loss"] == pytest.approx(3)

        # Sequence parallel: the group's parts of a balancing loss add up, z-losses are averaged.
        for _ in range(3):
            record(metrics, 2, routing_map((rank, 3)), [0.5, 0.7][rank], [2.0, 4.0][rank], dist.group.WORLD)
        report = report_of(metrics)
        assert report["load"] == {2: pytest.approx([1 / 4, 1 / 4, 0, 2 / 4])}
        assert report["load_balancing_loss"] == pytest.approx(1.2) and report["z_loss"] == pytest.approx(3)

        # Pipeline parallel: the second stage has no MoM layer, and never had one.
        metrics = MemoryMetrics()
        if rank == 0:
            record(metrics, 1, routing_map((0, 2)), 1.5, 1.0)
        report = report_of(metrics)
        assert report["load"] == {1: [0.5, 0, 0.5, 0]} and report["load_balancing_loss"] == 1.5
    finally:
        dist.destroy_process_group()


def test_collect_over_two_processes(tmp_path):
    warm_python.server()  # starts the server of multiprocessing's forks without GPUs, for gloo
    arguments = (str(tmp_path / "store"),)
    context = mp.start_processes(two_processes, arguments, nprocs=2, join=False, start_method="forkserver")
    deadline = time.monotonic() + 150
    try:
        while not context.join(timeout=1):  # raises what a worker raised
            assert time.monotonic() < deadline, "the workers did not end"
    finally:
        for process in context.processes:
            process.kill()
