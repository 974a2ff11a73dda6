"""Every key of config.json with values that no model has: one clear line, at once, and nothing written."""

import json
import random
import re
import time

import pytest
from test_convert_names import random_model

from linear_moe.commands import convert_from_hf, generate
from linear_moe.conversion import loading
from linear_moe.conversion.files import load_tokenizer
from mom_layers.hf import moe_config
from mom_layers.hf.fields import FIELDS

HYBRID = {"layers": [1], "num_heads": 2, "num_kv_heads": 1, "qkv_bias": False, "window_size": 8, "rope_theta": 500.0}
HYBRID |= {"head_dim": 16, "qk_norm": True, "rope_scaling": None}
MOE = {"layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
KEYS = [field.name for field in FIELDS] + [*TOKENS, "tie_word_embeddings", "dtype", "architectures", "model_type"]
KEYS += [f"attn.{key}" for key in HYBRID] + [f"moe.{key}" for key in moe_config.KEYS]
VALUES = {
    "string": "x", "empty string": "", "negative": -1, "zero": 0, "huge": 10**12, "beyond floats": 10**400,
    "null": None, "nested": {"a": [1]},
    "list": [1, 2], "NaN": float("nan"), "infinite": float("inf"), "fraction": 1.5, "true": True,
}  # fmt: skip
SECONDS = 10


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer_folder):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    random_model(folder, vocab_size=400, attn=HYBRID, moe=MOE)
    load_tokenizer(tokenizer_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def content(model):
    return json.loads((model / "config.json").read_text())


def write(model, content, key, value):
    changed = json.loads(json.dumps(content))
    section, dot, name = key.partition(".")
    (changed[section] if dot else changed)[name or section] = value
    (model / "config.json").write_text(json.dumps(changed))


def run(tool, model, *options) -> tuple[int, float]:
    started = time.monotonic()
    status = tool.main(["--load", str(model), *map(str, options)])
    return status, time.monotonic() - started


@pytest.mark.parametrize("key", KEYS)
def test_conversion(model, content, key, tmp_path, capsys):
    """Refused in one line; a value that the model can have (the largest rope_theta, say) is converted."""
    for label, value in VALUES.items():
        write(model, content, key, value)
        capsys.readouterr()
        target = tmp_path / label
        status, seconds = run(convert_from_hf, model, "--save", target)
        assert seconds < SECONDS and target.exists() == (status == 0), (label, status, seconds)
        if status:
            line = capsys.readouterr().err.splitlines()[-1]
            assert re.match(r"convert_from_hf.py: error: ", line) and len(line) < 500, (label, line)
            assert "Error:" not in line, (label, line)


def test_generation(model, content, capsys):
    """A sample of the same: building a model for each takes long."""
    drawn = random.Random(0).sample([(key, label) for key in KEYS for label in VALUES], 60)
    for key, label in drawn:
        write(model, content, key, VALUES[label])
        capsys.readouterr()
        status, seconds = run(generate, model, "--prompt", "a", "--max-new-tokens", "1", "--greedy")
        out, err = capsys.readouterr()
        assert seconds < SECONDS, (key, label)
        assert out if status == 0 else err.splitlines()[-1].startswith("generate.py: error: "), (key, label, err)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("norm_eps", "x", "norm_eps must be a number from 0 to 1, got 'x'"),
        ("hidden_size", -1, "hidden_size must be a whole number between 1 and 2147483647, got -1"),
        ("hidden_size", float("nan"), "hidden_size must be a whole number between 1 and 2147483647, got nan"),
        ("num_memories", True, "num_memories must be a whole number between 0 and 2147483647, got True"),
        ("aux_loss_scale", None, "aux_loss_scale must be a number from 0 to 1e+06, got None"),
        ("expand_v", 0, "expand_v must be a number above 0 and up to 1e+06, got 0"),
        ("intermediate_size", {}, "intermediate_size must be a whole number between 1 and 2147483647, or null, got {}"),
        ("shared_mem", "yes", "shared_mem must be true or false, got 'yes'"),
        ("pad_token_id", 400, "pad_token_id must be a whole number between 0 and 399, or null, got 400"),
        ("eos_token_id", [2, "x"], "eos_token_id must be a whole number"),
        ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false, got 1"),
        ("dtype", "int8", "dtype must be float32, bfloat16, float16, float64 or null, got 'int8'"),
        ("num_hidden_layers", 2**30, "config.json says num_hidden_layers 1073741824, and the weights have only"),
        ("num_memories", 2**30, "config.json: num_memories must be at most 16777216, got 1073741824"),
        ("vocab_size", 2**30, "model.embeddings.weight is [400, 32], and config.json makes it [1073741824, 32]"),
        ("num_heads", 2**30, "config.json: num_heads must be at most 16777216, got 1073741824"),
        ("attn.window_size", 2**40, "window_size must be a positive whole number up to 2147483647"),
        ("attn.rope_theta", 10**400, "rope_theta must be a positive number, got"),
    ],
)
def test_messages(model, content, key, value, words, tmp_path, capsys, monkeypatch):
    """The key, the value and what is accepted. Both tools refuse before a model is built."""
    monkeypatch.setattr(loading.MomForCausalLM, "__init__", lambda *_: pytest.fail("a model was built"))
    write(model, content, key, value)
    for tool, options in ((convert_from_hf, ["--save", tmp_path / "out"]), (generate, ["--prompt", "a"])):
        status, _ = run(tool, model, *options)
        assert status == 1 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "null", "[" * 100_000, '{"model_type": "mom", "hidden_size": ' + "9" * 5000]
)
def test_files_that_are_no_configuration(model, content, text, tmp_path, capsys):
    (model / "config.json").write_text(text)
    for tool, options in ((convert_from_hf, ["--save", tmp_path / "out"]), (generate, ["--prompt", "a"])):
        assert run(tool, model, *options)[0] == 1
        assert str(model / "config.json") in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'])
def test_indices_that_name_no_files(tmp_path, index, capsys):
    random_model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
    assert run(convert_from_hf, tmp_path / "model", "--save", tmp_path / "out")[0] == 1
    assert "model.safetensors.index.json" in capsys.readouterr().err
