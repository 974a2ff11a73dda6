"""Beyond linear_moe.pretrain: a launched script saves on SIGTERM too, and helper processes end with their parent."""

import json
import os
import re
import signal
import time
from pathlib import Path

from pretraining_runs import MOM, TINY
from stopped_runs import Run

SCRIPT = Path(__file__).parent / "script" / "pretrain_stand_in.py"
SAVED = "successfully saved checkpoint"


def test_a_script_under_the_launcher_saves_its_last_step_on_sigterm(tmp_path):
    words = [*TINY, *MOM, "--mock-data", "--train-iters", 2000, "--exit-signal-handler"]
    words += ["--save", tmp_path / "c", "--save-interval", 4]
    with Run(tmp_path, *words, words=("-m", "linear_moe", SCRIPT)) as run:
        run.wait_for(SAVED)
        run.signal_all(signal.SIGTERM)
        assert run.wait() == 0, run.text()[-3000:]
        assert run.left_after(10) == {}
        last = max(map(int, re.findall(r"\] iteration +(\d+)/", run.text())))
    assert (tmp_path / "c" / "latest_checkpointed_iteration.txt").read_text() == str(last)


def test_ranks_end_with_their_launcher(tmp_path):
    words = [*TINY, *MOM, "--mock-data", "--train-iters", 5000]
    with Run(tmp_path, *words, processes=2) as run:
        run.wait_for("step ", count=3)
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait()
        assert run.left_after(10) == {}


def test_the_death_of_the_process_that_writes_checkpoints_ends_the_run(tmp_path):
    words = [*TINY, *MOM, "--mock-data", "--train-iters", 2000, "--save", tmp_path / "c", "--save-interval", 4]
    words += "--async-save --async-strategy mcore --use-persistent-ckpt-worker".split()
    with Run(tmp_path, *words, environment={"MOM_VERBOSE": "0"}) as run:
        run.wait_for(SAVED)
        (worker,) = [pid for pid in run.processes() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(worker, signal.SIGKILL)
        assert run.wait(60) == 1
        assert "error: the process that writes checkpoints died" in run.text()
        assert run.left_after(10) == {}


def test_workers_of_the_preprocessing_end_with_it(tmp_path):
    with open(tmp_path / "corpus.jsonl", "w") as file:
        for number in range(400_000):
            print(json.dumps({"text": f"line {number} of a text that takes a while to read " * 4}), file=file)
    words = ["--input", tmp_path / "corpus.jsonl", "--output", tmp_path / "data", "--train-tokenizer", 300]
    words += ["--tokenizer-bytes", 10_000, "--workers", 2]
    with Run(tmp_path, *words, words=("tools/preprocess_data.py",)) as run:
        end = time.monotonic() + 120
        while len(run.processes()) < 4 and time.monotonic() < end:  # this one, two workers, multiprocessing's tracker
            assert run.process.poll() is None, run.text()[-3000:]
            time.sleep(0.05)
        assert len(run.processes()) == 4
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait()
        assert run.left_after(10) == {}
