"""fp16 training whose first steps are skipped, because the loss scale is too large: saved before its first step, and
resumed.
"""

import pytest
from training import DISTRIBUTED_OPTIMIZER, checkpoint_tensors, launch

STEPS = 8
FP16 = ["--mock-data", "--fp16", "--initial-loss-scale", 2.0**18, "--hysteresis", 1, "--train-iters", STEPS]
OPTIMIZERS = {
    "plain": [],
    "distributed": DISTRIBUTED_OPTIMIZER,
    "distributed, torch format": [*DISTRIBUTED_OPTIMIZER, "--ckpt-format", "torch"],
}


def moments(folder, step):
    return {name: tensor for name, tensor in checkpoint_tensors(folder, step).items() if "exp_avg" in name}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_before_the_first_step_and_resumed(tmp_path, optimizer):
    arguments, whole = [*FP16, *OPTIMIZERS[optimizer]], tmp_path / "whole"
    losses = launch(1, arguments, whole, save_at=(1,))
    assert losses[STEPS] < losses[1] - 0.2
    (whole / "latest_checkpointed_iteration.txt").write_text("1")
    resumed = launch(1, [*arguments, "--load", whole], tmp_path / "resumed", save_at=(2,))
    assert resumed == {step: loss for step, loss in losses.items() if step > 1}
    if "torch format" not in optimizer:
        assert not any(tensor.any() for tensor in moments(whole, 1).values())
        expected, got = moments(whole, STEPS), moments(tmp_path / "resumed", STEPS)
        assert got.keys() == expected.keys()
        assert all(tensor.any() and got[name].equal(tensor) for name, tensor in expected.items())
