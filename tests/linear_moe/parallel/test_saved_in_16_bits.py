"""Models in 16 bits, whose decay rates stay float32: a resumed run equals an uninterrupted one, to the bit.

Megatron's plain 16-bit optimizer, Muon beside it and Muon over data-parallel ranks; every form of checkpoint.
"""

from functools import cache

import pytest
import torch
from training import PP2, TP2, checkpoint_tensors, launch, muon_of_torch

STEPS, SAVED = 4, 2
BF16 = ["--mock-data", "--bf16"]
MUON = ["--optimizer", "muon"]
LAYER_WISE = [*MUON, "--use-distributed-optimizer"]
TORCH = ["--ckpt-format", "torch"]


def run(ranks, arguments, folder, steps=STEPS):
    words = [*BF16, *arguments, "--train-iters", steps]
    return launch(ranks, words, folder, save_at=(SAVED,), prepare=muon_of_torch if MUON[1] in arguments else None)


def tensors_of_files(folder, iteration):
    """The tensors of a checkpoint in the torch format, by file and place."""

    def below(value, path):
        if isinstance(value, torch.Tensor):
            yield path, value
        elif isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from below(inner, f"{path}.{key}")

    found = {}
    for file in sorted((folder / f"iter_{iteration:07d}").rglob("*.pt")):
        found |= below(torch.load(file, weights_only=False), f"{file.parent.name}/{file.name}")
    return {name: tensor for name, tensor in found.items() if ".rng_state" not in name}


def assert_same_bits(got, expected):
    assert sum(tensor.dtype == torch.float32 and "exp_avg_sq" in name for name, tensor in expected.items()) > 5
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


LAYOUTS = {
    "1": (1, []),
    "TP2": (2, TP2),
    "PP2": (2, PP2),
    "PP2, a stage without memories": (2, [*PP2, "--linear-attention-freq", "[0,1]"]),
    "PP2, a stage without memories, Muon": (2, [*PP2, "--linear-attention-freq", "[0,1]", *MUON]),
    "PP2, a stage without memories, layer-wise Muon": (2, [*PP2, "--linear-attention-freq", "[0,1]", *LAYER_WISE]),
    "1, torch format": (1, TORCH),
    "1, Muon": (1, MUON),
    "DP2, layer-wise Muon": (2, LAYER_WISE),
    "1, layer-wise Muon, torch format": (1, [*LAYER_WISE, *TORCH]),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(layout) -> losses of an uninterrupted run, and the folder of its checkpoints at half and at the end."""

    @cache
    def train(layout):
        folder = tmp_path_factory.mktemp("whole")
        return run(*LAYOUTS[layout], folder), folder

    return train


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumes_to_the_last_bit(whole, tmp_path, layout):
    losses, folder = whole(layout)
    ranks, arguments = LAYOUTS[layout]
    resumed = run(ranks, [*arguments, "--load", folder, "--ckpt-step", SAVED], tmp_path)
    assert resumed == {step: loss for step, loss in losses.items() if step > SAVED}
    read = tensors_of_files if "torch format" in layout else checkpoint_tensors
    assert_same_bits(read(tmp_path, STEPS), read(folder, STEPS))


@pytest.mark.parametrize("writer,reader", [("TP2", "1"), ("PP2", "TP2"), ("1", "PP2")])
def test_another_layout_loads_every_bit(whole, tmp_path, writer, reader):
    """The reader saves what it loaded, without a step between."""
    _, folder = whole(writer)
    ranks, arguments = LAYOUTS[reader]
    load = ["--load", folder, "--ckpt-step", SAVED, "--override-opt_param-scheduler"]
    run(ranks, [*arguments, *load], tmp_path, steps=SAVED)
    assert_same_bits(checkpoint_tensors(tmp_path, SAVED), checkpoint_tensors(folder, SAVED))


def test_layer_wise_muon_passes_on_parameters_of_both_types(whole):
    expected, _ = whole("1, Muon")
    losses, _ = whole("DP2, layer-wise Muon")
    assert losses == pytest.approx(expected, rel=2e-3) and losses[STEPS] < losses[1] - 0.2
