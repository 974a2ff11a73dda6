"""The comparison of converted models with a softmax model, at a size of a few steps."""

import json
import os
from dataclasses import replace

import pytest
import softmax_to_memories
from torch.utils.tensorboard import SummaryWriter


@pytest.fixture
def small(monkeypatch):
    scale = replace(softmax_to_memories.SCALES["tiny"], steps=20, eval_iters=2, layers=2, vocabulary=512)
    monkeypatch.setitem(softmax_to_memories.SCALES, "tiny", scale)
    return scale


def test_what_is_finished_is_reported_and_not_run_again(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(softmax_to_memories, "run_to_end", lambda *words, **_: pytest.fail(f"ran {words}"))
    for run, before, losses in (("softmax", 0, {10: 5.0, 20: 4.0}), ("all", 1, {1: 4.2})):
        writer = SummaryWriter(str(tmp_path / run / "tensorboard"))
        for step, loss in losses.items():
            writer.add_scalar("lm loss validation", loss, step)
        writer.close()
        (tmp_path / run / "done").write_text(json.dumps({"before": before, "steps": max(losses), "seconds": 1.0}))
    assert softmax_to_memories.main(["--output", str(tmp_path), "--only", "all"]) == 0
    assert "all                   2,048   4.2000          5.00%" in capsys.readouterr().out
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["best_softmax"] == 4.0 and [row["run"] for row in found["runs"]] == ["softmax", "all"]
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_a_step_that_fails_ends_the_comparison(tmp_path, capsys, monkeypatch):
    def fail(*words, **_):
        raise softmax_to_memories.DemoError("this failed with exit status 1: linear-moe demo-corpus")

    monkeypatch.setattr(softmax_to_memories, "run_to_end", fail)
    assert softmax_to_memories.main(["--output", str(tmp_path)]) == 1
    assert "error: this failed with exit status 1" in capsys.readouterr().err
    assert not (tmp_path / "softmax" / "done").exists()


if os.environ.get("MOM_ALL_LAYOUTS"):  # several trainings

    def test_every_run(small, tmp_path):
        assert softmax_to_memories.main(["--output", str(tmp_path), "--only", "all", "fourth-direct"]) == 0
        found = json.loads((tmp_path / "results.json").read_text())
        assert [row["run"] for row in found["runs"]] == ["softmax", "all", "fourth-direct"]
        assert all(0 < row["last"] < 20 for row in found["runs"])
