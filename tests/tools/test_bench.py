"""The timing tools run where there is no GPU, and write what they print."""

import pytest
from timed_rows import PNG, rows_of


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
