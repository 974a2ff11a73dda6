"""Folders from strangers: their code does not run without permission, and their links are not followed."""

import json
import os
import shutil
from pathlib import Path

import pytest
from test_convert_names import random_model

from linear_moe.commands import convert_from_hf, generate, perplexity, preprocess_data
from linear_moe.conversion.files import ConversionError, check_inside, load_tokenizer

CODE = """
import os
from transformers import PreTrainedTokenizerFast
os.makedirs({made!r}, exist_ok=True)
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def made(tmp_path) -> Path:
    """The folder that the code of `with_code` makes when it runs."""
    return tmp_path / "made"


@pytest.fixture
def with_code(tmp_path, tokenizer_folder, made, monkeypatch) -> Path:
    """A tokenizer that brings code along, while standard input says yes to every question."""
    folder = tmp_path / "with_code"
    shutil.copytree(tokenizer_folder, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.OwnTokenizer"]}
    config["tokenizer_class"] = "OwnTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(made=str(made)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


def test_preparing_data(tmp_path, corpus, with_code, made):
    words = ["--input", corpus, "--output", tmp_path / "data", "--tokenizer", with_code, "--workers", 1]
    preprocess_data.main(list(map(str, words)))
    assert not made.exists()
    assert preprocess_data.main([*map(str, words), "--trust-remote-code", "--overwrite"]) == 0
    assert made.exists()


def test_conversion_and_generation(tmp_path, with_code, made):
    try:
        load_tokenizer(with_code)
    except ConversionError as error:
        assert str(with_code) in str(error)
    model = tmp_path / "model"
    random_model(model, vocab_size=500)
    convert_from_hf.main(["--load", str(model), "--save", str(tmp_path / "out"), "--tokenizer", str(with_code)])
    generate.main(["--load", str(model), "--tokenizer", str(with_code), "--prompt", "a", "--max-new-tokens", "1"])
    assert not made.exists()


def test_perplexity(tmp_path, with_code, made, capsys):
    random_model(with_code, vocab_size=500)
    (tmp_path / "text").write_text("memory " * 100)
    words = ["--load", with_code, "--text", tmp_path / "text", "--max-length", 32, "--output", tmp_path / "plot.png"]
    perplexity.main(list(map(str, words)))
    assert not made.exists()
    assert perplexity.main([*map(str, words), "--trust-remote-code"]) == 0
    assert made.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_links_out_of_the_folder(tmp_path, capsys, tokenizer_folder, name):
    model, out = tmp_path / "model", tmp_path / "out"
    random_model(model, vocab_size=500)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, model)
    shutil.move(model / name, tmp_path / "elsewhere")
    (model / name).symlink_to("../elsewhere")
    assert convert_from_hf.main(["--load", str(model), "--save", str(out)]) == 1
    error = capsys.readouterr().err
    assert f"{model / name} leads to {tmp_path / 'elsewhere'}, outside its folder" in error
    assert not out.exists()

    (model / name).unlink()
    (model / "inside").mkdir()
    shutil.move(tmp_path / "elsewhere", model / "inside" / "file")
    (model / name).symlink_to("inside/file")
    link = tmp_path / "link"
    link.symlink_to(model)
    assert convert_from_hf.main(["--load", str(link), "--save", str(out)]) == 0


def test_an_index_that_names_files_outside(tmp_path, capsys):
    random_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "stolen.safetensors")
    for name in ("../stolen.safetensors", str(tmp_path / "stolen.safetensors")):
        index = {"weight_map": {"model.norm.weight": name}}
        (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
        assert convert_from_hf.main(["--load", str(tmp_path / "model"), "--save", str(tmp_path / "out")]) == 1
        assert "outside its folder" in capsys.readouterr().err


def test_the_cache_of_hugging_face_is_a_folder_of_links(tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    random_model(snapshot)
    for file in snapshot.iterdir():
        file.rename(blobs / file.name)
        file.symlink_to(os.path.relpath(blobs / file.name, snapshot))
    assert convert_from_hf.main(["--load", str(snapshot), "--save", str(tmp_path / "out")]) == 0
    (snapshot / "other").symlink_to("/etc/hostname")
    with pytest.raises(ConversionError, match="outside its folder"):
        check_inside(snapshot, ["other"])
