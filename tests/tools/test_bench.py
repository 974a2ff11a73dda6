"""The timing tools run where there is no GPU, and write what they print."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "tool,column,names",
    [
        ("bench_layers.py", "layer", {"mom", "softmax"}),
        ("bench_kernels.py", "kernel", {"gated_deltanet", "gla"}),
    ],
)
def test_times_one_case(tool, column, names, tmp_path):
    out = tmp_path / "rows.csv"
    command = [sys.executable, ROOT / "tools" / tool, "--cases", "1", "--csv", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row[column] for row in rows} == names
    # On a busy machine forward and backward can be timed faster than forward alone, so neither bounds the other.
    assert all(float(row[name]) > 0 for row in rows for name in ("forward_ms", "both_ms"))
