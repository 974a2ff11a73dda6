"""How a shrunk command is started, resumed and ended."""

import sys
import time
from pathlib import Path

import pytest

from linear_moe.commands.try_megatron_commands import in_order, next_run
from linear_moe.trials import processes, runs
from linear_moe.trials.argument_sets import ArgumentSet, to_options
from linear_moe.trials.shrink import Trial, shrink
from linear_moe.trials.table import Rows
from linear_moe.trials.verdict import FAILS, TRAINS


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


def test_one_thread_at_a_time_reads_exit_statuses():
    """multiprocessing reads the statuses of all processes where one is started, and a status can be read once."""

    class Process:
        sentinel = None

        @property
        def exitcode(self):
            assert processes.ONE_AT_A_TIME.locked()
            return 0

    assert processes._wait([Process(), Process()], seconds=1) == 0
    assert not processes.ONE_AT_A_TIME.locked()


def test_runs_go_on_from_rows_without_their_checkpoints(place, tmp_path):
    rows, made = Rows(tmp_path / "rows.csv"), set()

    def finish(run, result, *, checkpoint=False):
        assert next_run(trial(), rows, place, made) == run
        made.add(run)
        rows.add(set="tests/a", run=run, processes="2", result=result, reason="", seconds="1.0")
        if checkpoint:
            (place.output / "runs" / "tests_a" / run / "checkpoints" / "iter_0000003").mkdir(parents=True)

    for run in (runs.MOM, runs.SOFTMAX):  # of an earlier call on another machine
        rows.add(set="tests/a", run=run, processes="2", result=TRAINS, reason="", seconds="1.0")
    finish(runs.MOM, TRAINS, checkpoint=True)
    finish(runs.RESUMED, FAILS)
    finish(runs.SOFTMAX, TRAINS)
    assert next_run(trial(), rows, place, made) is None  # the run with softmax left no checkpoint
    made.clear()
    finish(runs.SOFTMAX, TRAINS, checkpoint=True)
    finish(runs.SOFTMAX_RESUMED, TRAINS)
    assert next_run(trial(), rows, place, set()) is None


def test_new_kinds_come_first_and_the_same_command_once():
    words = {"a": "--num-layers 12", "b": "--num-layers 16 --lr 1", "c": "--num-layers 24", "d": "--fp16"}
    sets = [ArgumentSet(name, "pretrain_gpt.py", to_options(text.split())) for name, text in words.items()]
    order = in_order(sets, [shrink(given) for given in sets])
    assert [[trial.name for trial in same] for same in order] == [["a", "c"], ["d"], ["b"]]
