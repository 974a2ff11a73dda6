"""Training from a checkpoint whose files name code: refused by name before anything runs."""

import os
import pickle
import shutil

import pytest
import torch
from pretraining_runs import MOM, TINY, pretrain

TRAINING = [*TINY, *MOM, "--mock-data", "--train-iters", "1", "--override-opt_param-scheduler"]


class MakesFolder:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.makedirs, (str(self.folder), 0o777, True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run = pretrain(*TRAINING, "--save", folder, "--save-interval", "1")
    assert run.returncode == 0, run.stdout[-3000:]
    return folder


def with_payload(checkpoint, where: str, made) -> None:
    """Puts the payload into one of the files that training unpickles."""
    metadata_file = checkpoint / "iter_0000001" / ".metadata"
    if where == ".metadata":
        metadata_file.write_bytes(pickle.dumps(MakesFolder(made)))
    elif where == "common.pt":
        torch.save({"args": MakesFolder(made)}, checkpoint / "iter_0000001" / "common.pt")
    else:  # one entry moves to a shard of its own
        metadata = pickle.loads(metadata_file.read_bytes())
        torch.save([MakesFolder(made)], checkpoint / "iter_0000001" / "__9_9.distcp")
        index = next(index for index in metadata.storage_data if index.fqn.startswith(where))
        place = metadata.storage_data[index]
        place.relative_path, place.offset = "__9_9.distcp", 0
        place.length = (checkpoint / "iter_0000001" / "__9_9.distcp").stat().st_size
        metadata_file.write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("where", [".metadata", "common_state", "rng_state", "common.pt"])
def test_nothing_runs(saved, tmp_path, where):
    checkpoint, made = tmp_path / "checkpoints", tmp_path / "made"
    shutil.copytree(saved, checkpoint)
    with_payload(checkpoint, where, made)
    run = pretrain(*TRAINING, "--load", checkpoint)
    assert run.returncode != 0 and not made.exists(), run.stdout[-3000:]
    assert "os.makedirs" in run.stdout
    if where != "common.pt":  # PyTorch's own limit, and message
        assert "error: " in run.stdout and "MOM_TRUST_CHECKPOINT=1)" in run.stdout and "Traceback" not in run.stdout
        assert "damaged" not in run.stdout
        pretrain(*TRAINING, "--load", checkpoint, environment={"MOM_TRUST_CHECKPOINT": "1"})
        assert made.exists()


def test_resumes(saved, tmp_path):
    """A whole checkpoint, with the state of the optimizer and of the random generators, passes the limit."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    run = pretrain(*TRAINING, "--train-iters", "2", "--load", tmp_path / "checkpoints")
    assert run.returncode == 0 and "successfully loaded checkpoint" in run.stdout, run.stdout[-3000:]
