"""The tool that checks and times exchanges between ranks: over gloo without a GPU, and on two GPUs."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python

TOOL = Path(__file__).parents[2] / "tools" / "bench_exchanges.py"
GPUS = torch.cuda.device_count()


def run(folder):
    words = [TOOL, "--check", "--csv", folder / "rows.csv"]
    if GPUS == 0:
        environment = {"PYTHONPATH": str(TOOL.parents[1])}
        return warm_python.run(*words, folder=folder, environment=environment, timeout=120, ranks=2)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.run([*command, *map(str, words)], cwd=TOOL.parents[1], timeout=400, **output)


@pytest.mark.skipif(GPUS == 1, reason="needs two GPUs, or none")
def test_every_exchange_is_right_and_timed(tmp_path):
    done = run(tmp_path)
    assert done.returncode == 0 and "WRONG" not in done.stdout, done.stdout[-3000:]
    exchanges = ["all-to-all", "all-gather", *["peer-memory"] * bool(GPUS)]
    routings = 2 * (len(exchanges) - 1) * bool(GPUS)  # of graphs
    assert done.stdout.count("right ") == 3 * len(exchanges) + routings
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = {row["exchange"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["one", *exchanges] and all(float(row["both_ms"]) > 0 for row in rows.values())
    if GPUS:
        assert {name for name, row in rows.items() if int(row["waits"])} == {"all-to-all"}


@pytest.mark.skipif(GPUS > 0, reason="for machines without a GPU")
@pytest.mark.parametrize(
    "environment,words,message",
    [
        ({}, [], "start this tool with torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, [], "--memories 4 does not divide over 3 ranks"),
    ],
)
def test_what_cannot_run_is_refused(tmp_path, environment, words, message):
    environment |= {"PYTHONPATH": str(TOOL.parents[1])}
    done = warm_python.run(TOOL, *words, folder=tmp_path, environment=environment, timeout=60)
    assert done.returncode == 2 and message in done.stdout
