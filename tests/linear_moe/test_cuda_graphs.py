"""Megatron's CUDA graphs around MoM layers: the losses of the same run without them."""

import importlib.util

import pytest
from pretraining_runs import MOM, TINY, losses, run_python

from linear_moe.entry.machine import end_process_groups

BF16 = ["--bf16", "--use-distributed-optimizer", "--mom-head-dim", 64, "--no-check-for-nan-in-loss-and-grad"]
GRAPHS = ["local", "full_iteration"]
if importlib.util.find_spec("transformer_engine"):
    GRAPHS.append("transformer_engine")


def train(*arguments):
    words = ["-m", "linear_moe.pretrain", *TINY, *MOM, *BF16, "--mock-data", "--train-iters", 8, "--eval-interval", 6]
    run = run_python(*words, *arguments, environment={"CUDA_VISIBLE_DEVICES": "0"}, new_interpreter=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return {step: float(loss) for step, loss in losses(run).items()}


@pytest.fixture(scope="module")
def without_graphs():
    return train()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", GRAPHS)
def test_losses_are_those_without_graphs(graphs, without_graphs):
    assert train("--cuda-graph-impl", graphs) == pytest.approx(without_graphs, rel=1e-2)


class Graph:
    """Stands for a CUDA graph, which a machine without a GPU cannot make."""

    def __init__(self, calls):
        self.calls = calls

    def reset(self):
        self.calls.append("reset")


def test_graphs_let_go_of_communicators_before_these_are_destroyed(monkeypatch):
    calls, held = [], {}
    held["graphs"] = [Graph(calls), Graph(calls)]
    monkeypatch.setattr("torch.cuda.CUDAGraph", Graph)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: calls.append("destroy"))
    end_process_groups()
    assert calls == ["reset", "reset", "destroy"]
