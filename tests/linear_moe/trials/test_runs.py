"""How a shrunk command is started, resumed and ended."""

import sys
import time
from pathlib import Path

import pytest

from linear_moe.trials import processes, runs
from linear_moe.trials.shrink import Trial


@pytest.fixture
def place(tmp_path):
    return runs.Place(tmp_path / "clone", tmp_path, tmp_path / "data" / "text", seconds=5)


def trial(*words):
    return Trial(name="tests/a", script="pretrain_gpt.py", words=words, processes=2, steps=6, save_interval=3)


def test_the_word_is_all_that_is_added(place, tmp_path):
    softmax, mom = (runs.command_of(trial("--bf16"), kind, place, tmp_path) for kind in (runs.SOFTMAX, runs.MOM))
    assert mom == [*softmax, "--token-mixer", "mom"]
    assert str(place.data) in softmax
    assert str(place.data) not in runs.command_of(trial("--mock-data"), runs.MOM, place, tmp_path)
    assert str(place.tokenizer) in runs.command_of(trial("--fim-data"), runs.MOM, place, tmp_path)


def test_a_run_is_resumed_from_the_checkpoint_at_half(place, tmp_path):
    checkpoints = place.output / "runs" / "tests_a" / runs.MOM / "checkpoints"
    for step in (3, 6):
        (checkpoints / f"iter_{step:07d}").mkdir(parents=True)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text("6")
    assert runs.has_checkpoint(trial(), runs.MOM, place)
    assert not runs.has_checkpoint(trial(), runs.SOFTMAX, place)
    runs._go_back(checkpoints, 3)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["iter_0000003", "latest_checkpointed_iteration.txt"]
    assert (checkpoints / "latest_checkpointed_iteration.txt").read_text() == "3"
    runs.clean(trial(), place)
    assert not checkpoints.exists()


PROGRAM = """
import os, sys, time
rank = int(os.environ["RANK"])
print("rank", rank, "of", os.environ["WORLD_SIZE"], *sys.argv[1:])
if sys.argv[1] == "fail" and rank == 1:
    raise ValueError("rank 1 fails")
if sys.argv[1] != "end":
    time.sleep(60)
"""


@pytest.mark.parametrize(("word", "status"), [("end", 0), ("fail", 1), ("wait", None)])
def test_processes_of_a_run(tmp_path, monkeypatch, word, status):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(processes, "GRACE", 0.5)
    start = time.monotonic()
    log = tmp_path / "run.txt"
    assert processes.run(
        ["program", word], 2, Path(processes.ROOT), tmp_path, log, seconds=30 if status == 0 else 20
    ) == (status)
    assert time.monotonic() - start < 50
    text = log.read_text()
    assert text.startswith(f"# 2 processes: python -m program {word}\n")
    assert f"rank 0 of 2 {word}" in text and f"rank 1 of 2 {word}" in text
    assert ("ValueError: rank 1 fails" in text) == (word == "fail")
    assert not list(tmp_path.glob("run.[01]")) and not processes.LIVE
