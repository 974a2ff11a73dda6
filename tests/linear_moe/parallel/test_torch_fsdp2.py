"""torch's FSDP2: trains as data parallelism does, resumes to the bit, and shares checkpoints with other layouts."""

import pytest
from training import DISTRIBUTED_OPTIMIZER, TP2, checkpoint_tensors, launch, parameters

STEPS, SAVED = 4, 2
MODEL = ["--mock-data", "--bf16", "--untie-embeddings-and-output-weights", "--linear-attention-freq", "[0,1]"]
FSDP2 = ["--use-torch-fsdp2"]


def run(ranks, arguments, folder, steps=STEPS):
    return launch(ranks, [*MODEL, *arguments, "--train-iters", steps], folder, save_at=(SAVED,))


def resume(folder):
    return ["--load", folder, "--ckpt-step", SAVED]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run(2, FSDP2, folder), folder


def test_losses_are_those_of_data_parallelism(whole, tmp_path):
    expected = launch(2, [*MODEL, *DISTRIBUTED_OPTIMIZER, "--train-iters", STEPS], tmp_path)
    losses, _ = whole
    assert losses == pytest.approx(expected, rel=1e-2) and losses[1] == expected[1]
    assert losses[STEPS] < losses[1] - 0.5


def test_resumes_to_the_last_bit(whole, tmp_path):
    losses, folder = whole
    assert run(2, [*FSDP2, *resume(folder)], tmp_path) == {3: losses[3], 4: losses[4]}
    expected, got = checkpoint_tensors(folder, STEPS), checkpoint_tensors(tmp_path, STEPS)
    assert got.keys() == expected.keys() and any("A_log" in name for name in expected)
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("ranks", "arguments"), [(1, []), (2, [*TP2, *FSDP2])], ids=["one process", "TP2"])
def test_another_layout_loads_every_bit(whole, tmp_path, ranks, arguments):
    """The reader saves what it loaded, without a step between."""
    _, folder = whole
    run(ranks, [*arguments, *resume(folder), "--override-opt_param-scheduler"], tmp_path, steps=SAVED)
    expected, got = checkpoint_tensors(folder, SAVED), checkpoint_tensors(tmp_path, SAVED)
    assert got.keys() == expected.keys()
    assert all(got[name].equal(tensor) for name, tensor in expected.items())


def test_loads_weights_of_another_layout(whole, tmp_path):
    _, folder = whole
    run(1, [*resume(folder), "--override-opt_param-scheduler"], tmp_path / "one", steps=SAVED)
    start = [*resume(tmp_path / "one"), "--override-opt_param-scheduler", *FSDP2]
    run(2, start, tmp_path / "two", steps=SAVED)
    expected, got = parameters(folder, SAVED), parameters(tmp_path / "two", SAVED)
    assert all(got[name].equal(tensor) for name, tensor in expected.items())
