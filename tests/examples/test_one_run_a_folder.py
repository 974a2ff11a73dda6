"""The main script's settings, and the lock of its folder, with stand-ins for all that the script starts."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from script_site import Site, wait_for


def locks(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".lock"))


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_a_second_run_is_refused_and_the_first_goes_on(site):
    first = site.start()
    assert locks(site.out) == [".lock", "checkpoints/.lock"]
    second = site.run()
    assert second.returncode == 1
    host = os.uname().nodename
    assert (
        f"error: {site.out} is in use by another run ({site.out}/.lock: host {host} process {first.pid} "
        in second.stderr
    )
    assert locks(site.out) == [".lock", "checkpoints/.lock"]
    site.finish()
    assert first.wait(30) == 0, first.stdout.read()
    assert locks(site.out) == []
    assert site.run().returncode == 0


def test_another_folder_with_the_same_checkpoints_is_refused_too(site, tmp_path):
    first = site.start()
    second = site.run(OUT=str(tmp_path / "other"), CHECKPOINTS=str(site.out / "checkpoints"))
    assert second.returncode == 1 and f"{site.out}/checkpoints is in use by another run" in second.stderr
    assert locks(tmp_path / "other") == []
    third = site.start(OUT=str(tmp_path / "other"))
    assert third.poll() is None
    site.finish()
    assert [first.wait(30), third.wait(30)] == [0, 0]


def test_of_runs_that_start_at_once_one_trains(site):
    (site.records / "hold").touch()
    site.out.mkdir()
    stale = f"host {os.uname().nodename} process 1 started 1 job none.0\n"
    (site.out / ".lock").write_text(stale)  # all of them find a lock to remove
    command = site.command({}) | {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    runs = [subprocess.Popen(**command) for _ in range(6)]
    wait_for(lambda: sum(run.poll() is not None for run in runs) == 5)
    assert [run.returncode for run in runs if run.poll() is not None] == [1] * 5
    site.finish()
    assert sorted(run.wait(30) for run in runs) == [0, 1, 1, 1, 1, 1]
    assert locks(site.out) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("to_all", [True, False])
def test_a_signal_reaches_the_training_once_and_its_end_releases_the_lock(site, number, to_all):
    run = site.start()
    (os.killpg if to_all else os.kill)(run.pid, number)
    time.sleep(0.3)
    assert locks(site.out) == [".lock", "checkpoints/.lock"]  # while the ranks may still save
    run.wait(30)
    assert json.loads((site.records / "stopped").read_text()) == [number]
    assert locks(site.out) == []


def test_the_lock_of_a_killed_script_holds_while_its_training_lives(site):
    run = site.start()
    run.kill()
    run.wait()
    second = site.run()
    assert second.returncode == 1 and "is in use by another run" in second.stderr
    site.finish()
    held = (site.out / ".lock").read_text().strip()
    wait_for(lambda: not living(held))
    third = site.run()
    assert third.returncode == 0, third.stderr
    assert f"was left locked by a run that is over ({held})" in third.stderr
    assert locks(site.out) == []


def living(lock: str) -> bool:
    """Whether a process of the run with this lock lives."""
    found = ["grep", "-qzxF", f"RUN_LOCK={lock}", *map(str, Path("/proc").glob("[0-9]*/environ"))]
    return subprocess.run(found, stderr=subprocess.DEVNULL).returncode == 0


def test_another_hosts_lock_is_named_with_what_to_do(site):
    site.out.mkdir()
    held = "host gpu99 process 4711 started 5 job 12.0"
    (site.out / ".lock").write_text(f"{held}\n")
    run = site.run()
    assert run.returncode == 1 and held in run.stderr and f"remove {site.out}/.lock" in run.stderr
    assert (site.out / ".lock").read_text() == f"{held}\n"
    # Slurm starts a job again only when its earlier start is over.
    assert site.run(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="0").returncode == 1
    assert site.run(SLURM_JOB_ID="12", SLURM_RESTART_COUNT="1").returncode == 0


def test_a_reused_process_number_is_another_process(site):
    site.out.mkdir()
    (site.out / ".lock").write_text(f"host {os.uname().nodename} process {os.getpid()} started 1 job none.0\n")
    assert site.run().returncode == 0


def test_of_the_nodes_of_one_run_the_first_takes_the_lock(site):
    nodes = [site.start(NNODES="2", NODE_RANK=rank) for rank in ("0", "1")]
    assert f"process {nodes[0].pid} " in (site.out / ".lock").read_text()
    assert [node.poll() for node in nodes] == [None, None]
    site.finish()
    assert [node.wait(30) for node in nodes] == [0, 0]
    assert locks(site.out) == []


NUMBERS = [
    "TP", "PP", "EP", "CP", "NNODES", "PROCESSES", "LAYERS", "HIDDEN", "FFN", "HEADS", "HEAD_DIM", "SEQ_LENGTH",
    "MICRO_BATCH", "GLOBAL_BATCH", "TRAIN_ITERS", "VOCAB", "MEMORIES", "TOPK", "ATTENTION_HEADS", "LOG_INTERVAL",
    "EVAL_INTERVAL", "SAVE_INTERVAL", "GPUS", "NODE_RANK", "MASTER_PORT", "DEMO", "SP", "OVERLAP", "LR",
    "WARMUP_FRACTION",
]  # fmt: skip


@pytest.mark.parametrize("name", NUMBERS)
def test_a_setting_is_a_number_or_an_error(site, name):
    for value in ("PATH[$(touch ran)]", "-1", "1" * 30 + "x", " 1"):
        run = site.run(**{name: value})
        assert run.returncode == 2 and run.stderr.startswith(f"error: {name}="), run.stderr
        assert run.stderr.count("\n") == 1
    assert site.untouched() and not (site.root / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PRECISION": "fp8"}, "PRECISION=fp8: use bf16 or fp32"),
        ({"TP": "01"}, "TP=01: use a whole number from 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2 with NNODES=2"),
        ({"GPUS": "4", "TP": "3"}, "TP=3 x PP=1 x CP=1 does not divide GPUS=4"),
        ({"TOKENIZER": ""}, "needs TOKENIZER"),
    ],
)
def test_settings_that_do_not_fit(site, settings, message):
    run = site.run(**settings)
    assert run.returncode == 2 and message in run.stderr
    assert site.untouched()


def test_paths_with_blanks_and_quotes(site, tmp_path):
    out = tmp_path / "my 'first' run"
    run = site.run(OUT=str(out), DATA_PATH="a  path", CHECKPOINTS=f"{out}/$(check) points")
    assert run.returncode == 0, run.stderr
    [following] = [line for line in run.stdout.splitlines() if line.startswith("next:")]
    assert shlex.split(following)[1:] == [
        sys.executable, f"{site.root}/tools/convert_to_hf.py", "--load", f"{out}/$(check) points", "--save", f"{out}/hf"
    ]  # fmt: skip
    arguments = site.arguments()
    assert arguments[arguments.index("--save") + 1] == f"{out}/$(check) points"


@pytest.mark.parametrize(
    ("data_path", "exists", "expected"),
    [
        ("{0}/my text", "my text", ["{0}/my text"]),
        ("{0}/text", "text", ["{0}/text"]),
        ("0.3 {0}/a 0.7 {0}/b", "a", ["0.3", "{0}/a", "0.7", "{0}/b"]),
        ("1 {0}/*", "a", ["1", "{0}/*"]),
    ],
)
def test_a_data_path_is_one_prefix_or_a_blend(site, tmp_path, data_path, exists, expected):
    (tmp_path / f"{exists}.bin").touch()
    (tmp_path / f"{exists}.idx").touch()
    assert site.run(DATA_PATH=data_path.format(tmp_path)).returncode == 0
    arguments = site.arguments()
    found = arguments[arguments.index("--data-path") + 1 : arguments.index("--split")]
    assert found == [word.format(tmp_path) for word in expected]


def test_folders_that_cannot_be_written(site, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    full = tmp_path / "full"
    full.mkdir()
    (full / ".lock").symlink_to("/dev/full")  # every write to it says that the disk is full
    for settings, message in [
        ({"OUT": str(file)}, f"error: OUT={file} cannot be a folder: File exists"),
        ({"CHECKPOINTS": f"{file}/x"}, f"error: CHECKPOINTS={file}/x cannot be a folder: Not a directory"),
        ({"OUT": str(full)}, f"error: cannot write {full}/.lock: No space left on device"),
        ({"OUT": "/proc/nowhere"}, "error: OUT=/proc/nowhere cannot be a folder: No such file or directory"),
    ]:
        run = site.run(**settings)
        assert (run.returncode, run.stderr) == (1, f"{message}\n")
        assert not (site.records / "arguments.json").exists()
    assert file.read_text() == "mine"
    assert locks(site.out) == []
