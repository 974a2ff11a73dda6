"""A conversion that fails prints one line on stderr, exits with status 1 and leaves no file behind."""

import errno
import json
import re
import resource
from argparse import Namespace
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from test_convert_names import EXPERTS, LATENT, TINY, random_model, read_weights

from linear_moe.commands import convert_from_hf, convert_to_hf
from linear_moe.conversion import checkpoint as hf_checkpoint
from linear_moe.conversion import files as hf_files
from linear_moe.conversion.config import arguments_from_config, layout_of
from mom_layers.hf import MomConfig
from mom_layers.recur.rules import rule_names


@pytest.fixture
def model(tmp_path):
    """A folder in the Hugging Face format."""
    random_model(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def checkpoint(tmp_path, model):
    """The same model as a Megatron checkpoint."""
    assert convert_from_hf.main(["--load", str(model), "--save", str(tmp_path / "checkpoint")]) == 0
    return tmp_path / "checkpoint"


def write_with_arguments(folder, shape=None, **changed):
    """A checkpoint whose tensors have the sizes ``shape``, and whose arguments say ``changed``."""
    config = MomConfig(**(TINY | (shape or {})))
    args = Namespace(**(vars(arguments_from_config(config)) | changed))
    folder.mkdir()
    hf_checkpoint.write_checkpoint(
        folder, layout_of(config), lambda entry: torch.float32, lambda entry: torch.zeros(entry.shape), args
    )
    return folder


def test_a_checkpoint_older_than_an_argument_has_its_default(tmp_path):
    folder = write_with_arguments(tmp_path / "checkpoint")
    args = hf_checkpoint.MegatronCheckpoint(folder / "release").args
    older = Namespace(**{name: value for name, value in vars(args).items() if name != "mom_single_kv_proj"})
    config = layout_of(MomConfig(**TINY))
    (tmp_path / "older").mkdir()
    hf_checkpoint.write_checkpoint(
        tmp_path / "older", config, lambda entry: torch.float32, lambda entry: torch.zeros(entry.shape), older
    )
    assert hf_checkpoint.MegatronCheckpoint(tmp_path / "older" / "release").args.mom_single_kv_proj is False


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs a tool that must fail. Returns the tool's output."""

    def run(tool, load, *options, target=None):
        target = target or tmp_path / "target"
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        capsys.readouterr()
        assert tool.main(["--load", str(load), "--save", str(target), *map(str, options)]) == 1
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path in before} == before
        assert not [path for path in tmp_path.rglob("*") if path not in before], "something was left behind"
        *_, line = capsys.readouterr().err.splitlines()
        assert re.match(r"convert_\w+\.py: error: ", line)
        return line

    return run


def test_a_folder_that_does_not_exist(refused, tmp_path):
    assert "no such folder" in refused(convert_to_hf, tmp_path / "nothing")
    assert "no such folder" in refused(convert_from_hf, tmp_path / "nothing")


def test_a_folder_that_is_no_checkpoint(refused, tmp_path, model, checkpoint):
    assert "latest_checkpointed_iteration.txt" in refused(convert_to_hf, model)
    assert "iter_0000007; there are release" in refused(convert_to_hf, checkpoint, "--iteration", 7)
    (checkpoint / "release" / ".metadata").rename(checkpoint / "release" / "mp_rank_00")
    assert "legacy format" in refused(convert_to_hf, checkpoint)


def test_a_model_that_is_not_mom(refused, tmp_path, model):
    attention = write_with_arguments(tmp_path / "attention", token_mixer="attention")
    assert "--token-mixer attention" in refused(convert_to_hf, attention)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "retnet"}))
    assert "'retnet'" in refused(convert_from_hf, model)
    (model / "config.json").write_text("{")
    assert "not JSON" in refused(convert_from_hf, model)
    (model / "config.json").unlink()
    assert "no config.json" in refused(convert_from_hf, model)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type learned_absolute"),
        ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
        ({"mom_rule": "titans"}, "unknown memory rule 'titans': choose one of " + ", ".join(rule_names())),
        ({"mom_rule": "gla"}, "memory_proj.decay"),
        ({"mom_num_memories": 3}, "router.weight"),
        ({"ffn_hidden_size": 64}, "linear_fc1.weight"),
        ({"mom_shared_memory": False}, "memory_proj"),
        ({"num_layers": 3}, "layers"),
        ({"untie_embeddings_and_output_weights": False}, "no place for output_layer.weight"),
        ({"hf_config": {"vocab_size": 41}}, "needs 41 rows"),
    ],
)
def test_arguments_that_do_not_fit(refused, tmp_path, changed, words):
    assert words in refused(convert_to_hf, write_with_arguments(tmp_path / "checkpoint", **changed))


def test_attention_that_the_format_lacks(refused, tmp_path):
    hybrid = {"attn": {"layers": [1], "num_heads": 2}}
    for changed, words in (
        ({"rotary_percent": 0.5}, "rotary-percent"),
        ({"qk_layernorm": True}, "has no decoder.layers.1.self_attention.q_layernorm.weight"),
        ({"kv_channels": 8}, "linear_qkv.weight is [96, 32]"),
        ({"window_size": (4, 4)}, "window-size"),
    ):
        checkpoint = write_with_arguments(tmp_path / f"{changed}", shape=hybrid, **changed)
        assert words in refused(convert_to_hf, checkpoint)


def test_experts_that_do_not_fit(refused, tmp_path):
    moe = {"moe": EXPERTS | {"layers": [0, 1]}}
    for changed, words in (
        ({"num_experts": 8}, "has 4 experts, and the arguments stored with it say --num-experts 8"),
        ({"num_experts": 2}, "has 4 experts, and the arguments stored with it say --num-experts 2"),
        ({"num_experts": None}, "the arguments stored with it have no --num-experts"),
        ({"moe_ffn_hidden_size": 16}, "linear_fc1.weight is [48, 32]"),
        ({"moe_router_num_groups": 3, "moe_router_group_topk": 1}, "n_group must divide num_experts, got 3 and 4"),
        ({"moe_shared_expert_intermediate_size": 8}, "has no decoder.layers.0.mlp.shared_experts.linear_fc1.weight"),
        ({"moe_latent_size": 8}, "--moe-latent-size 8: it needs None"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn"),
    ):
        checkpoint = write_with_arguments(tmp_path / f"{list(changed.items())}", shape=moe, **changed)
        assert words in refused(convert_to_hf, checkpoint)


def test_experts_that_are_missing(refused, tmp_path):
    random_model(tmp_path / "model", moe=EXPERTS | {"layers": [1]})
    weights = read_weights(tmp_path / "model")
    fewer = {name: tensor for name, tensor in weights.items() if ".experts.3." not in name}
    save_file(fewer, tmp_path / "model" / "model.safetensors")
    assert "lack model.layers.1.mlp.experts.3.down_proj.weight" in refused(convert_from_hf, tmp_path / "model")


@pytest.mark.parametrize("pattern", ["RR--", "R-M-", "RD", "R-GE", "R-R", "R-R-/R", "R-|/R-R-"])
def test_patterns_that_the_format_lacks(refused, tmp_path, pattern):
    checkpoint = write_with_arguments(tmp_path / "checkpoint", hybrid_layer_pattern=pattern, mtp_num_layers=1)
    line = refused(convert_to_hf, checkpoint)
    assert f"cannot hold --hybrid-layer-pattern {pattern}: its layers are pairs" in line


def test_softmax_layers_of_both_kinds_in_one_stage(refused, tmp_path):
    """Megatron builds such a model over several pipeline stages only."""
    attn = [{"layers": [0], "num_heads": 4, "rope_theta": None, "qk_norm": True}, LATENT | {"layers": [1]}]
    random_model(tmp_path / "model", attn=attn)
    assert convert_from_hf.main(["--load", str(tmp_path / "model"), "--save", str(tmp_path / "checkpoint")]) == 0
    assert hf_checkpoint.MegatronCheckpoint(tmp_path / "checkpoint" / "release").args.hybrid_layer_pattern == "*-|+-"
    assert "over several pipeline stages only" in refused(convert_to_hf, tmp_path / "checkpoint", "--verify")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["attn"][0]["rope_theta"] = 500.0
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert "attn's rope_theta must be null, got 500" in refused(convert_from_hf, tmp_path / "model")


def test_an_incomplete_checkpoint(refused, checkpoint):
    data = checkpoint / "release" / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert "was cut short" in refused(convert_to_hf, checkpoint)
    data.write_bytes(bytes(len(whole)))
    assert "cannot be read" in refused(convert_to_hf, checkpoint)
    data.unlink()
    assert "__0_0.distcp is missing" in refused(convert_to_hf, checkpoint)
    (checkpoint / "release" / ".metadata").write_bytes(b"\x80")
    assert ".metadata cannot be read" in refused(convert_to_hf, checkpoint)


def test_an_incomplete_model(refused, tmp_path, model):
    weights = read_weights(model)
    file = model / "model.safetensors"
    missing = {name: tensor for name, tensor in weights.items() if not name.endswith("k_proj.1.weight")}
    save_file(missing, file)
    assert "lack model.layers.0.attn.k_proj.1.weight" in refused(convert_from_hf, model)
    save_file(weights | {"model.layers.9.extra": torch.zeros(1)}, file)
    assert "model.layers.9.extra" in refused(convert_from_hf, model)
    save_file(weights | {"model.norm.weight": torch.zeros(7)}, file)
    assert "model.norm.weight is [7]" in refused(convert_from_hf, model)
    file.write_bytes(file.read_bytes()[:1000])
    assert "model.safetensors cannot be read" in refused(convert_from_hf, model)
    file.unlink()
    assert "has no model.safetensors" in refused(convert_from_hf, model)
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00001-of-00002.safetensors is missing" in refused(convert_from_hf, model)


def test_tokenizer_that_does_not_fit(refused, model, checkpoint, tokenizer_folder, tmp_path):
    assert "needs 400 rows" in refused(convert_to_hf, checkpoint, "--tokenizer", tokenizer_folder)
    assert "needs 400 rows" in refused(convert_from_hf, model, "--tokenizer", tokenizer_folder)
    assert "has no tokenizer" in refused(convert_to_hf, checkpoint, "--tokenizer", tmp_path)


@contextmanager
def small_files(limit):
    """Files cannot grow beyond a limit: as on a full disk, writing fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk(refused, model, checkpoint):
    with small_files(20_000):
        to_hf = refused(convert_to_hf, checkpoint)
        from_hf = refused(convert_from_hf, model)
    assert "File too large" in to_hf and "nothing was written" in to_hf
    assert "File too large" in from_hf and "nothing was written" in from_hf


def test_a_full_disk_in_a_later_shard(refused, checkpoint, monkeypatch):
    written = []

    def save(tensors, path, **options):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        save_file(tensors, path, **options)

    monkeypatch.setattr(hf_files, "save_file", save)
    assert "No space left on device" in refused(convert_to_hf, checkpoint, "--max-shard-size", "20KB")
    assert written


def test_an_existing_target_is_kept(refused, tmp_path, model, checkpoint):
    (tmp_path / "stranger").mkdir()
    (tmp_path / "stranger" / "thesis.txt").touch()
    for tool, load in ((convert_to_hf, checkpoint), (convert_from_hf, model)):
        assert "exists" in refused(tool, load, target=tmp_path / "stranger")
        assert "not overwriting" in refused(tool, load, "--overwrite", target=tmp_path / "stranger")
        assert "is a file" in refused(tool, load, target=tmp_path / "stranger" / "thesis.txt")


def test_overwrite_replaces_an_earlier_conversion(tmp_path, model, checkpoint):
    export, again = tmp_path / "export", tmp_path / "again"
    export.mkdir()  # an empty folder counts as no folder
    for tool, load, target in ((convert_to_hf, checkpoint, export), (convert_from_hf, model, again)):
        command = ["--load", str(load), "--save", str(target)]
        assert tool.main(command) == 0
        (target / "old").touch()
        assert tool.main(command) == 1
        assert tool.main([*command, "--overwrite"]) == 0
        assert not (target / "old").exists()
    assert not list(tmp_path.glob(".*"))
