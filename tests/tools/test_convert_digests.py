"""Weights that are missing, changed or not finite: every tool that reads them names the tensor and exits with 1."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_names import random_model, read_weights

from linear_moe.commands import convert_from_hf, convert_to_hf, generate, perplexity
from linear_moe.conversion.digests import DIGESTS, digest
from linear_moe.conversion.files import load_tokenizer
from linear_moe.conversion.loading import load_model

NAME = "model.layers.0.attn.k_proj.1.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder):
    """A Megatron checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("digests")
    random_model(folder / "model", vocab_size=400)
    load_tokenizer(tokenizer_folder).save_pretrained(folder / "model")
    assert convert_from_hf.main(["--load", str(folder / "model"), "--save", str(folder / "checkpoint")]) == 0
    return folder / "checkpoint"


@pytest.fixture
def export(checkpoint, tmp_path):
    assert convert_to_hf.main(["--load", str(checkpoint), "--save", str(tmp_path / "export")]) == 0
    return tmp_path / "export"


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs every tool that reads a folder's weights. Returns the last line of stderr of each."""
    (tmp_path / "text").write_text("Each token of a sequence. " * 20)

    def run(folder) -> list[str]:
        lines = []
        for tool, options in (
            (generate, ["--prompt", "A", "--max-new-tokens", "2"]),
            (perplexity, ["--text", tmp_path / "text", "--max-length", "16", "--output", tmp_path / "plot.png"]),
            (convert_from_hf, ["--save", tmp_path / "back"]),
        ):
            capsys.readouterr()
            assert tool.main(["--load", str(folder), *map(str, options)]) == 1
            out, err = capsys.readouterr()
            assert not out
            lines.append(err.splitlines()[-1])
        assert not (tmp_path / "back").exists() and not (tmp_path / "plot.png").exists()
        return lines

    return run


def change(folder, **tensors):
    """Rewrites the weights with other tensors; None removes one."""
    weights = read_weights(folder) | tensors
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_the_file_describes_every_tensor(export):
    content = json.loads((export / DIGESTS).read_text())
    assert content["algorithm"] == "sha256"
    assert content["tensors"] == {name: digest(tensor) for name, tensor in read_weights(export).items()}
    assert content["tensors"][NAME]["shape"] == [32, 32] and content["tensors"][NAME]["dtype"] == "float32"


def test_digests_are_of_bytes_type_and_shape():
    tensor = torch.arange(6, dtype=torch.bfloat16)
    others = [tensor.view(2, 3), tensor.view(torch.int16), tensor.float(), -tensor]
    assert len({json.dumps(digest(one)) for one in [tensor, *others]}) == 5
    assert digest(torch.zeros(3)) != digest(-torch.zeros(3))
    assert digest(tensor.view(2, 3).t()) == digest(tensor.view(2, 3).t().contiguous())


@pytest.mark.parametrize("with_digests", [True, False])
def test_missing_unexpected_and_wrongly_shaped_tensors(export, refused, with_digests):
    if not with_digests:
        (export / DIGESTS).unlink()
    weights = read_weights(export)
    change(export, **{NAME: None})
    assert all(f"the weights lack {NAME}" in line for line in refused(export))
    change(export, **{NAME: weights[NAME], "model.other": torch.zeros(1)})
    assert all("the weights have model.other" in line for line in refused(export))
    change(export, **{NAME: weights[NAME][:3].contiguous(), "model.other": None})
    assert all(f"{NAME} is [3, 32], and config.json makes it [32, 32]" in line for line in refused(export))


def test_a_flipped_bit(export, refused):
    file = export / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1001] ^= 1
    file.write_bytes(data)
    changed = [name for name, tensor in load_file(file).items() if digest(tensor) != _expected(export)[name]]
    assert len(changed) == 1
    for line in refused(export):
        assert f"{changed[0]} differs from {export / DIGESTS} in the bytes" in line


def _expected(folder) -> dict:
    return json.loads((folder / DIGESTS).read_text())["tensors"]


def test_another_type(export, refused):
    weights = read_weights(export)
    change(export, **{name: tensor.double() for name, tensor in weights.items()})
    assert all("in dtype and sha256" in line for line in refused(export))


def test_a_broken_list(export, refused):
    for content in ("{", "[]", '{"algorithm": "md5", "tensors": {}}', '{"algorithm": "sha256", "tensors": 1}'):
        (export / DIGESTS).write_text(content)
        assert all(DIGESTS in line for line in refused(export))
    (export / DIGESTS).write_text(json.dumps({"algorithm": "sha256", "tensors": dict.fromkeys(read_weights(export))}))
    assert all(f"differs from {export / DIGESTS}" in line for line in refused(export))


def test_the_file_that_is_checked_is_the_file_that_is_loaded(checkpoint, tmp_path, refused):
    """transformers reads model.safetensors where there are shards and an index too."""
    command = ["--load", str(checkpoint), "--save", str(tmp_path / "export"), "--max-shard-size", "50KB"]
    assert convert_to_hf.main(command) == 0
    export = tmp_path / "export"
    assert load_model(export) is not None
    weights = read_weights(export)
    save_file(weights | {NAME: torch.zeros(32, 32)}, export / "model.safetensors", metadata={"format": "pt"})
    assert all(f"{NAME} differs from {export / DIGESTS} in the bytes" in line for line in refused(export))


def test_changed_on_purpose(export):
    change(export, **{NAME: torch.zeros(32, 32)})
    (export / DIGESTS).unlink()
    assert not load_model(export).state_dict()[NAME].any()


def test_a_tied_weight_of_another_value(export, refused):
    (export / DIGESTS).unlink()
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert all("lm_head.weight differs from model.embeddings.weight" in line for line in refused(export))
    change(export, **{"lm_head.weight": read_weights(export)["model.embeddings.weight"].clone()})
    assert load_model(export).config.tie_word_embeddings


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path, refused, tokenizer_folder, value):
    model = tmp_path / "model"
    random_model(model, vocab_size=400)
    load_tokenizer(tokenizer_folder).save_pretrained(model)
    weight = read_weights(model)[NAME]
    weight[1, 2:4] = value
    change(model, **{NAME: weight})
    assert all(f"{NAME} has 2 values of 1024 that are NaN or infinite" in line for line in refused(model))


def test_a_type_that_overflows(tmp_path, capsys, tokenizer_folder):
    model, checkpoint, export = (tmp_path / name for name in ("model", "checkpoint", "export"))
    random_model(model, vocab_size=400)
    load_tokenizer(tokenizer_folder).save_pretrained(model)
    change(model, **{NAME: read_weights(model)[NAME] * 0 + 70000})
    assert generate.main(["--load", str(model), "--prompt", "A", "--dtype", "float16"]) == 1
    assert f"{NAME} has 1024 values of 1024 that are NaN or infinite in float16" in capsys.readouterr().err
    assert convert_from_hf.main(["--load", str(model), "--save", str(checkpoint)]) == 0
    command = ["--load", str(checkpoint), "--save", str(export), "--dtype"]
    assert convert_to_hf.main([*command, "float16"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{NAME} overflows in float16, whose largest number is 65504: it has 70000" in line
    assert not export.exists()
    assert convert_to_hf.main([*command, "bfloat16"]) == 0


def test_logits_that_are_not_finite(tmp_path, capsys, tokenizer_folder):
    """Every weight is finite, and their products are not."""
    random_model(tmp_path, vocab_size=400)
    weights = read_weights(tmp_path)
    change(tmp_path, **{name: torch.full_like(weights[name], 3e38) for name in ("model.norm.weight", "lm_head.weight")})
    command = ["--load", str(tmp_path), "--tokenizer", str(tokenizer_folder), "--prompt", "A"]
    for options in ([], ["--greedy"]):
        assert generate.main([*command, *options]) == 1
        assert "logits are NaN or infinite" in capsys.readouterr().err
