"""Checkpoints that are damaged, missing, of another model, or that a full disk refuses: told in one line, none lost."""

import os
import re
import shutil

import pytest
from pretraining_runs import MOM, TINY, losses, pretrain

RUN = [*TINY, *MOM, "--mock-data", "--train-iters", 9]
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Losses of nine steps, and the checkpoints of steps three and six."""
    folder = tmp_path_factory.mktemp("trained")
    run = pretrain(*RUN, "--save", folder / "c", "--save-interval", 3)
    assert run.returncode == 0, run.stdout[-3000:]
    shutil.rmtree(folder / "c" / "iter_0000009")
    (folder / "c" / TRACKER).write_text("6")
    return losses(run), folder / "c"


def resume(trained, folder, change=None, *arguments):
    """Changes a copy of the checkpoints, and trains on from there."""
    shutil.copytree(trained[1], folder / "c")
    if change:
        change(folder / "c")
    return pretrain(*RUN, "--load", folder / "c", *arguments)


def message(run) -> str:
    """The one line in which a run that failed tells why."""
    assert run.returncode not in (0, None) and "Traceback" not in run.stdout, run.stdout[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("content", ["", "sechs", "12"])
def test_another_tracker_is_told_and_the_newest_complete_checkpoint_taken(trained, tmp_path, content):
    run = resume(trained, tmp_path, lambda c: (c / TRACKER).write_text(content))
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{TRACKER} holds {content!r}, which" in run.stdout
    assert "the newest complete checkpoint is taken, iteration 6" in run.stdout
    assert losses(run) == {step: loss for step, loss in trained[0].items() if step > 6}


def test_a_tracker_beside_no_complete_checkpoint_is_an_error(trained, tmp_path):
    def change(checkpoints):
        (checkpoints / TRACKER).write_text("")
        for path in checkpoints.glob("iter_*/metadata.json"):
            path.unlink()

    run = resume(trained, tmp_path, change)
    assert f"{TRACKER} holds '', which is not the number of an iteration, and there is no complete" in message(run)


def test_a_checkpoint_that_has_to_be_there_and_is_not_is_an_error(trained, tmp_path):
    run = resume(trained, tmp_path, lambda c: (c / TRACKER).unlink(), "--exit-on-missing-checkpoint")
    assert f"--exit-on-missing-checkpoint: {tmp_path / 'c'} has no {TRACKER}; complete checkpoints" in message(run)


def shard(checkpoints):
    return checkpoints / "iter_0000006" / "__0_0.distcp"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: shard(c).unlink(), r"__0_0\.distcp is missing"),
        (
            lambda c: os.truncate(shard(c), 5000),
            r"__0_0\.distcp was cut short: 5000 bytes are there, \d+ are described",
        ),
        (lambda c: shard(c).write_bytes(bytes(shard(c).stat().st_size)), r"a file is damaged \(UnpicklingError: .*\)"),
        (lambda c: os.truncate(c / "iter_0000006" / ".metadata", 500), r"\.metadata is damaged \(.*\)"),
    ],
    ids=["missing", "cut short", "zeros", "metadata cut short"],
)
def test_a_damaged_checkpoint_is_named_with_what_can_be_loaded_instead(trained, tmp_path, change, told):
    run = resume(trained, tmp_path, change)
    folder = re.escape(str(tmp_path / "c"))
    expected = rf"error: the checkpoint {folder}/iter_0000006 cannot be loaded: {told}; "
    expected += rf"complete checkpoints in {folder}: iterations 3 \(--ckpt-step takes one\)"
    assert re.fullmatch(expected, message(run)), message(run)


@pytest.mark.parametrize(
    ("option", "value", "saved"), [("--hidden-size", 128, 64), ("--num-layers", 3, 2), ("--ffn-hidden-size", 192, 128)]
)
def test_another_model_is_told_by_the_arguments_that_differ(trained, tmp_path, option, value, saved):
    told = message(resume(trained, tmp_path, None, option, value))
    assert (
        f"belongs to another model: {option} was {saved} when the checkpoint was written, this run has {value}:" in told
    )


@pytest.mark.parametrize("save", ["", "--async-save --async-strategy mcore --use-persistent-ckpt-worker"])
def test_a_full_disk_is_named_and_leaves_no_part_of_a_checkpoint(trained, tmp_path, save):
    def change(checkpoints):  # a device on which there is never room stands in the place of a file of iteration 8
        (checkpoints / "iter_0000008").mkdir()
        os.symlink("/dev/full", checkpoints / "iter_0000008" / "__0_0.distcp")

    checkpoints = tmp_path / "c"
    run = resume(trained, tmp_path, change, "--save", checkpoints, "--save-interval", 8, *save.split())
    told = message(run)
    assert told.startswith(
        f"error: the checkpoint of iteration 8 cannot be written to {checkpoints}: [Errno 28] No space"
    )
    assert re.search(r"MB are free on its disk\); a restart resumes from iteration 6$", told), told
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["iter_0000003", "iter_0000006", TRACKER, "log.txt"]
    assert (checkpoints / TRACKER).read_text() == "6"


def test_a_full_disk_leaves_the_tracker_as_it_was(trained, tmp_path):
    checkpoints = tmp_path / "c"
    run = resume(
        trained, tmp_path, lambda c: os.symlink("/dev/full", c / f"{TRACKER}.partial"),
        "--save", checkpoints, "--save-interval", 8,
    )  # fmt: skip
    assert "No space left on device" in message(run)
    assert (checkpoints / TRACKER).read_text() == "6" and not (checkpoints / f"{TRACKER}.partial").exists()


@pytest.mark.parametrize("optimizer", [[], ["--use-distributed-optimizer"]], ids=["plain", "distributed"])
def test_another_learning_rate_is_named(tmp_path, optimizer):
    run = [*TINY, *MOM, "--mock-data", *optimizer, "--lr-decay-iters", 4]
    assert pretrain(*run, "--train-iters", 1, "--save", tmp_path, "--save-interval", 1).returncode == 0
    run += ["--load", tmp_path, "--train-iters", 2]
    told = message(pretrain(*run, "--lr", "1e-3", "--override-opt_param-scheduler"))
    assert "--lr is 0.001 and was 0.01 when the checkpoint was written" in told and "--no-load-optim" in told
    resumed = pretrain(*run, "--lr", "1e-3", "--override-opt_param-scheduler", "--no-load-optim")
    assert resumed.returncode == 0 and list(losses(resumed)) == [2], resumed.stdout[-3000:]


def test_another_schedule_is_named(trained, tmp_path):
    told = message(resume(trained, tmp_path, None, "--train-iters", 10))
    assert "total number of iterations 40, in the checkpoint 36, from --train-iters, --lr-decay-iters or" in told
    assert "--override-opt_param-scheduler" in told
