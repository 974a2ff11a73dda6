"""Dropout over two ranks on a CPU: a resumed run draws the same masks, and the ranks save the same arguments."""

from training import TP2, launch


def test_resumes_to_the_last_bit_with_dropout(tmp_path):
    dropout = ["--mock-data", "--hidden-dropout", 0.1, "--attention-dropout", 0.1, "--train-iters", 4, *TP2]
    dropout += ["--linear-attention-freq", 2]
    losses = launch(2, dropout, tmp_path / "whole", save_at=(2,))
    logs = [(tmp_path / "whole" / f"rank_{rank}.txt").read_text() for rank in range(2)]
    assert not any("common state dict differs" in log for log in logs)
    without = launch(2, [*dropout, "--hidden-dropout", 0, "--attention-dropout", 0], tmp_path / "without")
    assert losses[1] != without[1]
    resumed = launch(2, [*dropout, "--load", tmp_path / "whole", "--ckpt-step", 2], tmp_path / "resumed")
    assert resumed == {step: loss for step, loss in losses.items() if step > 2}
