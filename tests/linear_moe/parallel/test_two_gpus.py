"""The script for two GPUs judges runs, and a case that fails does not stop the others. The runs here are made up."""

import csv
import sys
from types import SimpleNamespace

import pytest
import torch
import two_gpus
from two_gpus import CASES, STEPS, Case, Run, Trainer, furthest, judge, last_error

from linear_moe.config import MomTransformerConfig
from linear_moe.parallel.context import ContextSlice
from mom_layers.recur.rules import RuleInputs, get_rule

ALONE = Run({step: 5.0 - step / 2 for step in range(1, STEPS + 1)}, {step: 1.0 for step in range(1, STEPS + 1)}, 1.0)


def changed(losses=None, norms=None) -> Run:
    return Run(ALONE.losses | (losses or {}), ALONE.norms | (norms or {}), 1.0)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (changed(), ""),
        (changed({STEPS: 2.01}), ""),
        (changed({STEPS: 5.0}), "the loss does not fall"),
        (changed({3: 3.6}), "losses are not one GPU's"),
        (changed({3: float("nan")}), "losses are not one GPU's"),
        (changed(norms={1: 2.0}), "gradient norms are not one GPU's"),
    ],
)
def test_numbers_are_judged(run, why):
    found, _ = judge(CASES[0], run, ALONE)
    assert found.startswith(why) and bool(found) == bool(why)


def test_a_long_slice_is_cut_into_parts():
    """The parts are what the cases with long sequences compare: by the sizes of their model, on each of two ranks."""
    numbers = [*two_gpus.MODEL, *two_gpus.BASES["long sequences"]]
    length, batch, heads = (
        int(numbers[len(numbers) - numbers[::-1].index(name)])
        for name in ("--seq-length", "--micro-batch-size", "--mom-num-heads")
    )
    memories, choices = MomTransformerConfig.mom_num_memories + 1, MomTransformerConfig.mom_topk + 1
    here = object.__new__(ContextSlice)
    here.documents = None
    plan = SimpleNamespace(num_segments=batch * memories, num_rows=batch * length // 2 * choices)
    inputs = RuleInputs(None, None, torch.empty(0, heads, 0), {})
    assert here._num_parts(plan, get_rule(MomTransformerConfig.mom_rule), inputs) == 2


def test_a_missing_step_is_no_agreement():
    assert furthest({1: 5.0}, {1: 5.0, 2: 4.0}) == float("inf")


def test_the_first_error_of_the_output_is_the_cause(tmp_path):
    log = tmp_path / "log"
    log.write_text("Traceback\n[rank1]: ValueError: the cause\ntorch.distributed.elastic.ChildFailedError: later\n")
    assert last_error(log) == "[rank1]: ValueError: the cause"


def test_a_case_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def train(trainer, name, ranks, arguments, environment=None):
        if name == "falls over":
            raise OSError("no room")
        return Run({}, {}, 1.0, "exit 1: the cause") if name == "fails" else ALONE

    names = ("right", "fails", "falls over", "needs a GPU")
    cases = [Case(name, [], gpu="a reason" if "GPU" in name else "") for name in names]
    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(two_gpus, "CASES", cases)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(sys, "argv", ["two_gpus", "--logs", str(tmp_path), "--csv", str(tmp_path / "table.csv")])
    assert two_gpus.main() == 2
    assert "1 right, 2 not" in capsys.readouterr().out
    with (tmp_path / "table.csv").open() as file:
        rows = [(row["case"], row["result"], row["why"]) for row in csv.DictReader(file)]
    assert rows == [
        ("right", "right", ""),
        ("fails", "failed", "exit 1: the cause"),
        ("falls over", "failed", "OSError: no room"),
        ("needs a GPU", "not run", "needs a GPU: a reason"),
    ]
