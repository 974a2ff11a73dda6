"""The settings that the recipe of a model chooses on GPUs of a given number and memory, and the bytes behind them.

The script prints its settings and ends at an impossible NODE_RANK, before it prepares data.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from linear_moe.entry.fit import Layout, Model, bytes_on_gpu, choose

ROOT = Path(__file__).parents[2]
SMALL = Model(24, 1024, 2048, 4, 256, 4, 2, 2048, 32000)
MEASURED = {
    "one": Layout(),
    "DP2": Layout(data=2),
    "TP2+SP": Layout(tensor=2),
    "EP2": Layout(expert=2, data=2),
    "CP2": Layout(context=2, data=2),
}


def settings(folder, **given):
    """What the script prints, by name, and its errors."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "MOM_PYTHON": sys.executable, "NODE_RANK": "1"}
    run = subprocess.run(
        ["bash", ROOT / "examples" / "pretrain_mom_a100.sh"], capture_output=True, text=True, timeout=120, cwd=folder,
        env=environment | {"OUT": str(folder / "out")} | {name: str(value) for name, value in given.items()},
    )  # fmt: skip
    assert run.returncode != 0
    lines = (line.strip().split("=", 1) for line in run.stdout.splitlines() if "=" in line)
    return dict(lines), run.stderr


@pytest.mark.parametrize(
    "given,expected",
    [
        ({"GPUS": 4, "GPU_GB": 150}, {"LAYERS": "24", "HIDDEN": "1024", "TP": "1", "MICRO_BATCH": "16", "SP": "0"}),
        ({"GPUS": 1, "GPU_GB": 42}, {"MICRO_BATCH": "4", "RECOMPUTE": "0", "LOSS_CHUNK": "0", "TRAIN_ITERS": "28610"}),
        (
            {"MODEL": "1.3b", "GPUS": 4, "GPU_GB": 85},
            {"HIDDEN": "2048", "FFN": "5632", "GLOBAL_BATCH": "1024", "TP": "1", "MICRO_BATCH": "8", "RECOMPUTE": "0"},
        ),
        (
            {"MODEL": "7b", "GPUS": 2, "GPU_GB": 85, "GLOBAL_BATCH": 64},
            {"HIDDEN": "4096", "HEADS": "8", "SEQ_LENGTH": "4096", "TP": "2", "SP": "1", "RECOMPUTE": "1"},
        ),
        ({"MODEL": "7b", "GPUS": 4, "GPU_GB": 85, "TP": 4, "MICRO_BATCH": 2}, {"TP": "4", "MICRO_BATCH": "2"}),
        ({"GPUS": 4, "GPU_GB": 150, "CP": 4, "SEQ_LENGTH": 1048576}, {"LOSS_CHUNK": "16384"}),
    ],
)
def test_what_is_left_open_is_chosen(tmp_path, given, expected):
    found, errors = settings(tmp_path, **given)
    assert expected.items() <= found.items(), (found, errors)
    assert "NODE_RANK=1 with NNODES=1" in errors


@pytest.mark.parametrize(
    "given,message",
    [
        ({"MODEL": "7b", "GPUS": 1, "GPU_GB": 85}, "error: the model does not fit: with TP=1 and recomputation"),
        ({"MODEL": "7b", "GPUS": 2, "GPU_GB": 80}, "TP=2 and recomputation a GPU would need about 82 GB, and has 80"),
        ({"MODEL": "13b", "GPUS": 1}, "error: MODEL=13b: use 380m, 1.3b or 7b"),
        ({"GPUS": 3, "GPU_GB": 85, "TP": 2}, "error: TP=2 x PP=1 x CP=1 does not divide GPUS=3 x NNODES=1"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, given, message):
    assert message in settings(tmp_path, **given)[1]


@pytest.mark.parametrize(
    "model,gpu_gb,chosen",
    [
        ("1.3b", 151, {1: (1, 16, False), 2: (1, 16, False), 4: (1, 16, False)}),
        ("1.3b", 85, {1: (1, 8, False), 2: (1, 8, False), 4: (1, 8, False)}),
        ("1.3b", 42, {1: (1, 1, False), 2: (1, 2, False), 4: (1, 4, False)}),
        ("7b", 151, {1: None, 2: (1, 1, False), 4: (1, 2, False)}),
        ("7b", 85, {1: None, 2: (2, 2, True), 4: (2, 2, False)}),
        ("7b", 42, {1: None, 2: None, 4: (4, 2, True)}),
    ],
)
def test_choices_are_those_of_the_documentation(model, gpu_gb, chosen):
    """The table in docs/parallelism.md."""
    sizes = {"1.3b": (24, 2048, 5632, 4, 256, 4, 2, 2048), "7b": (32, 4096, 11008, 8, 256, 4, 2, 4096)}[model]
    for gpus, expected in chosen.items():
        common = {"gpu_bytes": 1e9 * gpu_gb, "global_batch": 1024, "largest_tensor": gpus}
        assert choose(Model(*sizes, 32000), gpus=gpus, **common) == expected


def test_computed_bytes_are_those_that_were_measured():
    with (ROOT / "tools" / "measured" / "h200x2_layouts.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["layout"] in MEASURED and row["sequence"] == "2048"]
    assert {row["layout"] for row in rows} == set(MEASURED)
    for row in rows:
        computed = bytes_on_gpu(SMALL, MEASURED[row["layout"]], int(row["micro_batch"]), False) / 2**30
        assert computed == pytest.approx(float(row["peak_gib"]), rel=0.12), row["layout"]


def test_one_long_sequence_is_recomputed_in_what_was_measured():
    long = Model(24, 1024, 2048, 4, 256, 4, 2, 131072, 32000)
    assert bytes_on_gpu(long, Layout(), 1, True) / 2**30 == pytest.approx(38.66, rel=0.05)
    assert bytes_on_gpu(long, Layout(context=2, data=2), 1, True) / 2**30 == pytest.approx(20.81, rel=0.05)


def test_tensor_parallelism_comes_before_recomputation_and_given_sizes_stay():
    large = Model(32, 4096, 11008, 8, 256, 4, 2, 4096, 32000)
    common = {"gpus": 8, "gpu_bytes": 85e9, "global_batch": 1024}
    assert choose(large, **common) == (2, 2, False)
    assert choose(large, **common, largest_tensor=1)[2] is True
    assert choose(large, **common, tensor=8, micro_batch=4) == (8, 4, False)
    assert choose(large, **common, tensor=3) is None
