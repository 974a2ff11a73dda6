"""The timing tools run without a GPU, and write the numbers that they print."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import bench_layers
import bench_rules
import benchmark
import matplotlib.pyplot as plt
import pytest
import torch
from timed_rows import PNG, rows_of


@pytest.mark.parametrize(
    "tool,column,names",
    [
        ("bench_layers.py", "layer", {"mom", "softmax"}),
        ("bench_kernels.py", "kernel", {"gated_deltanet", "gla"}),
        ("bench_models.py", "model", {"mom"}),
        ("bench_rules.py", "rule", set(bench_rules.OPERATIONS)),
    ],
)
def test_a_timing_tool_times_one_case(tool, column, names, tmp_path):
    assert {row[column] for row in rows_of(tool, tmp_path, "--cases", 1)} == names


def test_kernels_are_compiled_in_processes_before_they_are_timed(tmp_path):
    rows = rows_of("bench_rules.py", tmp_path, "--rules", "retention", "--processes", 2)
    assert [row["rule"] for row in rows] == ["retention"]


def test_a_job_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_CACHE_AUTOTUNING", raising=False)
    benchmark.compile_in_processes(Path.touch, [(tmp_path / "no" / "folder",), (tmp_path / "written",)], 1)
    assert (tmp_path / "written").exists()
    assert "TRITON_CACHE_AUTOTUNING" not in os.environ


def test_costs_over_sequence_lengths_are_drawn(tmp_path):
    rows = rows_of("bench_layers.py", tmp_path, "--lengths", "--cases", 2, "--plot", tmp_path / "cost.png")
    assert [(row["layer"], row["tokens"]) for row in rows] == [
        ("mom", "256"), ("softmax", "256"), ("mom", "512"), ("softmax", "512"),
    ]  # fmt: skip
    assert (tmp_path / "cost.png").read_bytes().startswith(PNG)


def test_a_layer_that_runs_out_of_memory_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def measure(layer, case, device, graph):
        if isinstance(layer, bench_layers.SoftmaxAttention) and case[1] > 256:
            raise torch.OutOfMemoryError
        return 1.0, 2.0, float("nan"), 3.0

    monkeypatch.setattr(bench_layers, "measure", measure)
    monkeypatch.setattr(bench_layers, "device_kind", lambda: "cpu")
    assert bench_layers.main(["--lengths", "--csv", str(tmp_path / "rows.csv"), "--plot", str(tmp_path / "p.png")]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert [line.split()[:4] for line in told] == [["B1", f"T{tokens}", "d64", "softmax"] for tokens in (512, 1024)]
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = [(row["layer"], row["tokens"]) for row in csv.DictReader(file)]
    assert rows == [("mom", "256"), ("softmax", "256"), ("mom", "512"), ("mom", "1024")]
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_the_guide_grows_with_the_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(plt, "close", lambda figure: None)
    rows = [{"layer": "mom", "tokens": tokens, "ms": ms, "gib": 0} for tokens, ms in ((1, 3), (4, 8), (2, 5))]
    panels = {"ms": "time", "gib": "memory"}
    benchmark.plot_growth(tmp_path / "p.png", rows, "tokens", panels, "layer", "title", guide=True)
    (axis,) = plt.gcf().axes  # no memory was measured
    measured, guide = axis.lines
    assert list(measured.get_ydata()) == [3, 5, 8] and list(guide.get_ydata()) == [2, 4, 8]


TUNED = """
import sys
sys.path[:0] = sys.argv[1:]
import benchmark, torch, triton, triton.language as tl
from compile_only import compiling

benchmark.tune_quickly()
seen = []

def time_it(call, quantiles):
    seen.append(len(compiled))
    call()
    return [float(len(seen))] * 3

@triton.autotune([triton.Config({"B": b}) for b in (16, 32, 64)], key=["n"], do_bench=time_it)
@triton.jit
def double(x, n, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.static_assert(B != 32)
    tl.store(x + o, 2 * tl.load(x + o, mask=o < n), mask=o < n)

with compiling("sm_90") as compiled:
    double[(1,)](torch.zeros(64), 64)
assert seen == [3, 4, 4] and double.best_config.kwargs == {"B": 16}, (seen, double.best_config)
"""


def test_a_peers_configurations_are_compiled_before_they_are_timed(tmp_path):
    """All three configurations are compiled first. One fails, fails again when timed, and is not chosen."""
    (tmp_path / "tuned.py").write_text(TUNED)
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, tmp_path / "tuned.py", tests.parent / "tools", tests / "mom_layers"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-2000:]
