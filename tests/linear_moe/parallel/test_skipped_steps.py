"""fp16 training whose first steps are skipped, because the loss scale is too large: saved before and after its first
step, and resumed.
"""

import pytest
from training import DISTRIBUTED_OPTIMIZER, checkpoint_tensors, launch

STEPS = 8
FP16 = ["--mock-data", "--fp16", "--initial-loss-scale", 2.0**22, "--hysteresis", 1]
OPTIMIZERS = {
    "plain": [],
    "distributed": DISTRIBUTED_OPTIMIZER,
    "distributed, torch format": [*DISTRIBUTED_OPTIMIZER, "--ckpt-format", "torch"],
}


@pytest.mark.parametrize("arguments", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_saved_before_the_first_step_and_resumed(tmp_path, arguments):
    whole = launch(1, [*FP16, *arguments, "--train-iters", STEPS], tmp_path / "whole", save_at=(1,))
    assert "number of skipped iterations:   0" not in (tmp_path / "whole" / "rank_0.txt").read_text()
    load = ["--load", tmp_path / "whole", "--ckpt-step", 1]
    resumed = launch(1, [*FP16, *arguments, *load, "--train-iters", STEPS], tmp_path / "resumed", save_at=(2,))
    assert resumed == {step: loss for step, loss in whole.items() if step > 1}
    if arguments == OPTIMIZERS["distributed"]:
        expected, got = (checkpoint_tensors(tmp_path / name, STEPS) for name in ("whole", "resumed"))
        assert all(got[name].equal(tensor) for name, tensor in expected.items() if "exp_avg" in name)
