"""Checkpoints whose files name code, given to the tools: refused by name, and opened with --trust-checkpoint."""

import pickle
from pathlib import Path

import pytest
import torch
from test_convert_names import random_model

from linear_moe.commands import convert_from_hf, convert_to_hf, generate

LIMIT = "give --trust-checkpoint (in training: MOM_TRUST_CHECKPOINT=1)"


class MakesFolder:
    """Unpickling makes a folder, and returns the value that the object wraps."""

    def __init__(self, folder: Path, value):
        self.folder, self.value = folder, value

    def __reduce__(self):
        code = f"[__import__('os').makedirs({str(self.folder)!r}, exist_ok=True), value][1]"
        return eval, (code, {"value": self.value})


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    random_model(tmp_path / "model")
    assert convert_from_hf.main(["--load", str(tmp_path / "model"), "--save", str(tmp_path / "checkpoint")]) == 0
    return tmp_path / "checkpoint"


@pytest.fixture
def made(tmp_path, checkpoint) -> Path:
    """The folder that the code in the checkpoint's metadata would make."""
    path = checkpoint / "release" / ".metadata"
    path.write_bytes(pickle.dumps(MakesFolder(tmp_path / "made", pickle.loads(path.read_bytes()))))
    return tmp_path / "made"


def test_conversion_refuses_or_trusts(checkpoint, made, tmp_path, capsys):
    command = ["--load", str(checkpoint), "--save", str(tmp_path / "export")]
    assert convert_to_hf.main(command) == 1
    error = capsys.readouterr().err
    assert f"{checkpoint / 'release' / '.metadata'} names builtins.eval" in error and LIMIT in error
    assert not made.exists() and not (tmp_path / "export").exists()
    assert convert_to_hf.main([*command, "--trust-checkpoint", "--verify", "--verify-tokens", "8"]) == 0
    assert made.exists()


def test_generation_refuses_or_trusts(checkpoint, made, tokenizer_folder, capsys):
    command = ["--load", str(checkpoint), "--prompt", "a", "--tokenizer", str(tokenizer_folder)]
    assert generate.main(command) == 1
    assert LIMIT in capsys.readouterr().err and not made.exists()
    generate.main([*command, "--trust-checkpoint"])  # the tokenizer is another model's
    assert LIMIT not in capsys.readouterr().err and made.exists()


def test_common_state_of_older_checkpoints_is_read_without_its_classes(checkpoint, tmp_path):
    """The classes that the common state names are not imported, and their values are left out."""
    torch.save({"args": MakesFolder(tmp_path / "made", None), "iteration": 1}, checkpoint / "release" / "common.pt")
    assert convert_to_hf.main(["--load", str(checkpoint), "--save", str(tmp_path / "export")]) == 1
    assert not (tmp_path / "made").exists()
