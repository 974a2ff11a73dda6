"""The entry, as a user runs it: training, resuming, refusing."""

import shutil

import numpy as np
import pytest
from pretraining_runs import MOM, TINY, losses, pretrain


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six steps on random tokens, a checkpoint at three and at six."""
    checkpoints = tmp_path_factory.mktemp("run") / "checkpoints"
    save = ["--save", checkpoints, "--save-interval", 3]
    run = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 6, *save, new_interpreter=True)
    assert run.returncode == 0, run.stdout[-3000:]
    return run, checkpoints


def at_step_three(checkpoints, target):
    """A copy of the checkpoints as they were after step three."""
    shutil.copytree(checkpoints, target)
    shutil.rmtree(target / "iter_0000006")
    (target / "latest_checkpointed_iteration.txt").write_text("3")
    return target


def test_loss_falls_and_a_line_tells_it(trained):
    run, _ = trained
    steps = losses(run)
    assert list(steps) == [1, 2, 3, 4, 5, 6]
    assert float(steps[6]) < float(steps[1]) - 0.3
    assert "memory load" in run.stdout and "balance" in run.stdout


def test_resumes_to_the_same_losses_with_arguments_from_the_checkpoint(trained, tmp_path):
    run, checkpoints = trained
    start = at_step_three(checkpoints, tmp_path / "checkpoints")
    resumed = pretrain(
        *TINY, "--mock-data", "--train-iters", 6, "--load", start, "--use-checkpoint-args",
    )  # fmt: skip
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert losses(resumed) == {step: loss for step, loss in losses(run).items() if step > 3}


def test_attention_and_hybrid_differ_in_one_word():
    attention = pretrain(*TINY, "--mock-data", "--train-iters", 3, "--token-mixer", "attention")
    hybrid = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 3, "--linear-attention-freq", 2)
    for run in (attention, hybrid):
        assert run.returncode == 0, run.stdout[-3000:]
        assert float(losses(run)[3]) < float(losses(run)[1])
    assert "memory load" not in attention.stdout


def test_bf16_with_the_distributed_optimizer(tmp_path):
    precision = ["--bf16", "--use-distributed-optimizer"]
    save = ["--save", tmp_path / "c", "--save-interval", 2]
    run = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 4, *precision, *save)
    assert run.returncode == 0, run.stdout[-3000:]
    shutil.rmtree(tmp_path / "c" / "iter_0000004")
    (tmp_path / "c" / "latest_checkpointed_iteration.txt").write_text("2")
    resumed = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 4, *precision, "--load", tmp_path / "c")
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    assert losses(resumed) == {step: loss for step, loss in losses(run).items() if step > 2}


def test_help_lists_our_arguments():
    run = pretrain("--help")
    assert run.returncode == 0 and "--mom-num-memories" in run.stdout, run.stdout[-2000:]


@pytest.fixture
def dataset(tmp_path):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix = tmp_path / "data"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(127))
    rng = np.random.default_rng(0)
    for _ in range(50):
        builder.add_document(rng.integers(0, 120, 100), [100])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(
    "arguments,message",
    [
        ([*MOM, "--mom-rule", "hebb"], "argument --mom-rule: invalid choice: 'hebb'"),
        ([*MOM, "--mom-topk", "5"], "topk must be between 1 and the number of memories (4), got 5"),
        (["--token-mixer", "mom", "--mom-head-dim", "100"], "head_dim = 100 is not supported by the gated_deltanet"),
        ([*MOM, "--data-path", "nowhere/data"], "there is no nowhere/data.bin"),
    ],
)
def test_refuses_bad_arguments(arguments, message, tmp_path):
    data = [] if "--data-path" in arguments else ["--mock-data"]
    run = pretrain(*TINY, *arguments, *data, "--train-iters", 2, "--save", tmp_path / "c", "--save-interval", 1)
    assert run.returncode != 0
    assert message in run.stdout and "Traceback" not in run.stdout, run.stdout[-2000:]
    assert not list(tmp_path.glob("c/iter_*"))


def test_refuses_a_truncated_data_file(dataset):
    binary = dataset.with_suffix(".bin")
    binary.write_bytes(binary.read_bytes()[:-10])
    run = pretrain(*TINY, *MOM, "--data-path", dataset, "--train-iters", 2)
    assert run.returncode != 0 and "Traceback" not in run.stdout
    assert f"{binary} holds 9990 bytes and its index describes 10000" in run.stdout


def test_refuses_a_checkpoint_of_another_shape(trained):
    _, checkpoints = trained
    run = pretrain(*TINY, *MOM, "--mom-num-memories", 2, "--mock-data", "--train-iters", 8, "--load", checkpoints)
    assert run.returncode != 0
    assert "the checkpoint was written with --mom-num-memories 4, the command line says 2" in run.stdout


def test_a_nan_loss_ends_the_run_without_a_checkpoint(tmp_path):
    save = ["--save", tmp_path / "c", "--save-interval", 5]
    run = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 5, *save, "--lr", "1e30", "--clip-grad", 0)
    assert run.returncode != 0
    assert "the training loss is NaN" in run.stdout, run.stdout[-2000:]
    assert not list((tmp_path / "c").glob("iter_*"))
