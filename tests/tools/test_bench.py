"""The timing tools run where there is no GPU, and write what they print."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PNG = b"\x89PNG"


def rows_of(tool, folder, *arguments):
    """What a tool wrote as CSV. Times are noise on a busy machine: neither do they bound each other, nor grow."""
    out = folder / "rows.csv"
    command = [sys.executable, ROOT / "tools" / tool, "--csv", out, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(float(row[name]) > 0 for row in rows for name in row if "ms" in name)
    return rows


@pytest.mark.parametrize(
    "tool,column,names",
    [
        ("bench_layers.py", "layer", {"mom", "softmax"}),
        ("bench_kernels.py", "kernel", {"gated_deltanet", "gla"}),
        ("bench_models.py", "model", {"mom"}),
    ],
)
def test_times_one_case(tool, column, names, tmp_path):
    assert {row[column] for row in rows_of(tool, tmp_path, "--cases", 1)} == names


def test_cost_over_lengths(tmp_path):
    rows = rows_of("bench_layers.py", tmp_path, "--lengths", "--cases", 2, "--plot", tmp_path / "cost.png")
    assert [(row["layer"], row["tokens"]) for row in rows] == [
        ("mom", "256"), ("softmax", "256"), ("mom", "512"), ("softmax", "512"),
    ]  # fmt: skip
    assert (tmp_path / "cost.png").read_bytes().startswith(PNG)


def test_decoding_keeps_a_constant_state_beside_a_growing_cache(tmp_path):
    rows = rows_of("bench_decode.py", tmp_path, "--plot", tmp_path / "decode.png")

    def kept(what, mixer):
        return [int(r["bytes_per_sequence"]) for r in rows if (r["what"], r["mixer"]) == (what, mixer)]

    assert len(set(kept("layer", "mom"))) == len(set(kept("model", "mom"))) == 1
    assert kept("layer", "softmax") == [2 * 64 * 4 * context for context in (64, 256, 64)]
    assert kept("model", "softmax") == [2 * 2 * 64 * 4 * context for context in (64, 256)]
    assert (tmp_path / "decode.png").read_bytes().startswith(PNG)
