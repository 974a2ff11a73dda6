"""Values of a command line: what a type makes of a text, and what it refuses."""

from argparse import ArgumentTypeError
from pathlib import Path

import bench_layouts
import benchmark
import pytest
import torch

from linear_moe.commands.values import between, device, picture, seed, size


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (size, "5GB", 5 * 10**9), (size, "1.5 kb", 1500), (size, "2MiB", 2 << 20), (size, "7", 7), (size, "7B", 7),
        (picture, "a/loss", Path("a/loss.png")), (picture, "loss.PDF", Path("loss.PDF")),
        (device, "cpu", torch.device("cpu")), (seed, "4294967295", 2**32 - 1), (between(0, 2), "1e-3", 1e-3),
    ],
)  # fmt: skip
def test_a_text_becomes_a_value(type_, text, value):
    assert type_(text) == value


@pytest.mark.parametrize(
    ("type_", "text"),
    [
        (size, ""), (size, "0"), (size, "1.5"), (size, "-1"), (size, "5XB"), (size, "nan"), (size, "9" * 40),
        (picture, ""), (picture, "."), (picture, "folder"), (picture, "loss.txt"), (picture, "x" * 300),
        (device, ""), (device, "meta"), (device, "cuda:99"), (device, "gpu"), (device, "-1"),
        (seed, "-1"), (seed, "4294967296"), (between(0, 2), "nan"), (between(0, 2), "-1e-300"), (between(0, 2), "inf"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_value_is_refused_and_quoted(type_, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(ArgumentTypeError, match="expected|too long") as refused:
        type_(text)
    assert repr(text) in str(refused.value)


@pytest.mark.parametrize("words", ["--cases 0", "--cases -1", "--cases x", "--csv=", "--plot .", "--plot loss.txt"])
def test_the_timing_tools_refuse_wrong_values(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse_options("", words.split(), plot=True)
    assert words.partition(" ")[0].removesuffix("=") in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--steps 0", "--global-batch 0", "--timeout nan", "--timeout 0"])
def test_the_comparison_of_layouts_refuses_wrong_values(words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench_layouts.main(["--output", str(tmp_path / "out"), *words.split()])
    assert words.partition(" ")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
