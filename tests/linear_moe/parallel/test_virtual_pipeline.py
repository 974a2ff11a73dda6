"""Virtual pipeline stages in bf16, whose buckets are bf16 and float32: every way of reducing gradients trains alike."""

import pytest
from training import DISTRIBUTED_OPTIMIZER, PP2, launch

VIRTUAL = ["--mock-data", "--bf16", "--train-iters", 4, "--num-layers", 4, *PP2]
VIRTUAL += ["--num-layers-per-virtual-pipeline-stage", 1]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Losses with all-reduced float32 gradients: buckets of one type, and no parameters to gather."""
    losses = launch(2, VIRTUAL, tmp_path_factory.mktemp("all_reduced"))
    assert losses[4] < losses[1] - 0.5
    return losses


@pytest.mark.parametrize("arguments", [[], OVERLAP], ids=["", "overlap"])
def test_distributed_optimizer(expected, tmp_path, arguments):
    assert launch(2, [*VIRTUAL, *DISTRIBUTED_OPTIMIZER, *arguments], tmp_path) == expected


def test_gradients_reduced_in_bf16(expected, tmp_path):
    losses = launch(2, [*VIRTUAL, "--grad-reduce-in-bf16"], tmp_path)
    assert losses == pytest.approx(expected, rel=1e-2) and losses[1] == expected[1]


def test_parameters_gathered_during_the_optimizer_step(expected, tmp_path):
    """Every step compares the parameters of the data-parallel ranks."""
    ranks_agree = ["--overlap-param-gather-with-optimizer-step", "--check-weight-hash-across-dp-replicas-interval", 1]
    arguments = [*VIRTUAL, *DISTRIBUTED_OPTIMIZER, *OVERLAP, *ranks_agree, "--ckpt-format", "torch"]
    losses = launch(4, [*arguments, "--global-batch-size", 8], tmp_path)
    assert losses[4] < losses[1] - 0.5
