"""A checkpoint of any layout goes on in any other, with its optimizer's state; a broken checkpoint is passed over."""

import os
import signal

import pytest
from conftest import ALONE, ARGUMENTS, EXPERTS, GLA, LAYOUTS, MODELS, PACKED, ROUTED, SAVED, STEPS
from training import launch

TABLE = ["1", "TP2", "PP2", "EP2", "CP2"]
if os.environ.get("MOM_ALL_LAYOUTS"):  # 90 pairs
    TABLE += ["TP2+SP", "DP2", "CP2+TP2", "TP2+SP x PP2", "TP2+SP+EP2"]
BEYOND = [("1", "TP2+SP+EP2"), ("TP2+SP+EP2", "1"), ("TP2+SP+EP2", "PP2"), ("DP2", "EP2")]
WHOLE = "EP2, whole memories"
BEYOND += [("EP2", WHOLE), (WHOLE, "EP2"), (WHOLE, "1")]
BEYOND += [("CP2+TP2+SP", "EP2"), ("TP2+SP+EP2", "CP4")]


def go_on(writer, reader, model, trained, documents, folder):
    """The last two steps, from the writer's checkpoint."""
    expected, checkpoint = trained(writer, model)
    ranks, layout = LAYOUTS[reader]
    data = ["--data-path", documents, "--train-iters", STEPS]
    losses = launch(ranks, [*ARGUMENTS[model], *data, *layout, "--load", checkpoint, "--ckpt-step", SAVED], folder)
    assert list(losses) == [SAVED + 1, STEPS]
    assert losses == pytest.approx({step: expected[step] for step in losses}, rel=1e-5)


@pytest.mark.parametrize(
    "writer,reader",
    dict.fromkeys([(writer, reader) for writer in TABLE for reader in TABLE if writer != reader] + BEYOND),
)
def test_continues_in_another_layout(trained, documents, tmp_path, writer, reader):
    go_on(writer, reader, PACKED, trained, documents, tmp_path)


@pytest.mark.parametrize(
    "writer,reader", [("EP2", "TP2"), ("TP2", "EP2"), ("EP2", "1"), ("CP2", "TP2"), ("EP2", "CP2")]
)
def test_continues_without_the_distributed_optimizer(trained, documents, tmp_path, writer, reader):
    go_on(writer, reader, ROUTED, trained, documents, tmp_path)


@pytest.mark.parametrize("writer,reader", [("EP2", WHOLE), (WHOLE, "EP2"), (WHOLE, "1"), ("1", WHOLE)])
def test_memories_whole_and_split_beside_experts(trained, documents, tmp_path, writer, reader):
    go_on(writer, reader, EXPERTS, trained, documents, tmp_path)


def test_gated_linear_attention_continues_in_another_layout(trained, documents, tmp_path):
    go_on("TP2+SP", "EP2", GLA, trained, documents, tmp_path)


@pytest.mark.parametrize("writer,reader", [("TP2+SP", "1"), ("PP2", "TP2")])
def test_one_memory_alone_continues_in_another_layout(trained, documents, tmp_path, writer, reader):
    go_on(writer, reader, ALONE, trained, documents, tmp_path)


def test_resumes_to_the_last_bit(trained, documents, tmp_path):
    expected, checkpoint = trained("1", PACKED)
    data = ["--data-path", documents, "--train-iters", STEPS, *MODELS[PACKED]]
    losses = launch(1, [*data, "--load", checkpoint, "--ckpt-step", SAVED], tmp_path)
    assert losses == {step: loss for step, loss in expected.items() if step > SAVED}


def die_in_second_save():
    """Kills the process when a second checkpoint's tensors are on disk and its index is not."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    finish, saves = FileSystemWriterAsync.finish, []

    def finish_once(*args, **kwargs):
        if saves:
            os.kill(os.getpid(), signal.SIGKILL)
        saves.append(1)
        return finish(*args, **kwargs)

    FileSystemWriterAsync.finish = finish_once


def test_a_process_killed_in_mid_save_resumes_from_the_checkpoint_before(trained, documents, tmp_path):
    expected, _ = trained("1", PACKED)
    data = ["--data-path", documents, *MODELS[PACKED], "--train-iters", STEPS]
    with pytest.raises(AssertionError, match=r"exit codes \[-9\]"):
        launch(1, data, tmp_path, save_at=(3, 6), prepare=die_in_second_save)
    assert list((tmp_path / "iter_0000006").glob("*.distcp")) and not (tmp_path / "iter_0000006/.metadata").exists()
    losses = launch(1, [*data, "--load", tmp_path], tmp_path, save_at=(6,))
    assert losses == {step: loss for step, loss in expected.items() if step > 3}
    assert (tmp_path / "iter_0000006/.metadata").exists()


def die_in_fifth_step():
    """Kills the second rank between backward and the optimizer's step of step five."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    step, steps = ChainedOptimizer.step, []

    def step_or_die(self):
        steps.append(1)
        if len(steps) == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    ChainedOptimizer.step = step_or_die


def test_a_rank_killed_in_mid_step_resumes_from_the_checkpoint_before(trained, documents, tmp_path):
    expected, _ = trained("TP2+SP", PACKED)
    ranks, layout = LAYOUTS["TP2+SP"]
    data = ["--data-path", documents, *MODELS[PACKED], *layout, "--train-iters", STEPS]
    with pytest.raises(AssertionError, match="-9"):
        launch(ranks, data, tmp_path, save_at=(3,), prepare=die_in_fifth_step)
    losses = launch(ranks, [*data, "--load", tmp_path], tmp_path)
    assert losses == {step: loss for step, loss in expected.items() if step > 3}


def test_checkpoints_written_beside_the_training_are_the_same(trained, documents, tmp_path):
    expected, _ = trained("TP2+SP", PACKED)
    ranks, layout = LAYOUTS["TP2+SP"]
    data = ["--data-path", documents, *MODELS[PACKED], *layout, "--train-iters", STEPS]
    assert launch(ranks, [*data, "--async-save"], tmp_path, save_at=(3, 6)) == expected
    losses = launch(ranks, [*data, "--load", tmp_path, "--ckpt-step", 3], tmp_path)
    assert losses == {step: loss for step, loss in expected.items() if step > 3}
