"""Checkpoints that Megatron wrote on several parallel layouts, converted to the Hugging Face format and back."""

import filecmp
import json
import os
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import warm_python
from test_convert_names import VARIANTS, random_model, read_weights, same

from linear_moe import __version__
from linear_moe.commands import convert_from_hf, convert_to_hf
from linear_moe.conversion.checkpoint import MegatronCheckpoint, find_checkpoint
from linear_moe.conversion.verify import Difference, compare, exported_logits, megatron_logits
from mom_layers.reference import mixture_of_memories_reference

REPOSITORY = Path(__file__).parents[2]
MODEL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --max-position-embeddings 32"
    " --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope --attention-dropout 0"
    " --hidden-dropout 0 --token-mixer mom --mom-num-heads 2 --mom-head-dim 16"
).split()
TRAINING = (
    "--seq-length 32 --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --save-interval 2 --eval-iters 0"
    " --eval-interval 100 --mock-data --no-create-attention-mask-in-dataloader --make-vocab-size-divisible-by 64"
).split()
NULL_TOKENIZER = "--tokenizer-type NullTokenizer --vocab-size 127".split()


def pretrain(save: Path, *options: str, processes: int = 1) -> Path:
    """Trains for two steps in processes of its own, and returns the folder of checkpoints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= warm_python.ENVIRONMENT
    words = ["-m", "linear_moe.pretrain", *TRAINING, *options, "--save", save]
    result = warm_python.run(*words, folder=REPOSITORY, environment=environment, timeout=280, ranks=processes)
    assert result.returncode == 0, result.stdout[-5000:]
    return save


def to_hf(load: Path, save: Path, *options: str) -> Path:
    assert convert_to_hf.main(["--load", str(load), "--save", str(save), *options]) == 0
    return save


def from_hf(load: Path, save: Path, *options: str) -> Path:
    assert convert_from_hf.main(["--load", str(load), "--save", str(save), *options]) == 0
    return save


def printed_options(release: Path) -> list[str]:
    """What convert_from_hf prints for the model of its release."""
    return shlex.split(convert_from_hf.command_line(release, MegatronCheckpoint(release / "release").args))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory, tokenizer_folder) -> Path:
    """Softmax layers with grouped queries, an output layer of its own, a tokenizer; two ranks share every layer."""
    return pretrain(
        tmp_path_factory.mktemp("hybrid") / "checkpoints", *MODEL, "--lr", "1e-2",
        "--tensor-model-parallel-size", "2", "--sequence-parallel", "--use-distributed-optimizer",
        "--linear-attention-freq", "2", "--group-query-attention", "--num-query-groups", "2",
        "--untie-embeddings-and-output-weights",
        "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer_folder),
        processes=2,
    )  # fmt: skip


@pytest.fixture(scope="session")
def stacked(tmp_path_factory) -> Path:
    """A bfloat16 model of MoM layers alone, without a shared memory."""
    return pretrain(
        tmp_path_factory.mktemp("stacked") / "checkpoints", *MODEL, *NULL_TOKENIZER, "--lr", "1e-2", "--bf16",
        "--no-save-optim", "--no-mom-shared-memory", "--mom-expand-v", "2.0", "--mom-num-memories", "3",
    )  # fmt: skip


@pytest.fixture(scope="session")
def hybrid_export(hybrid, tmp_path_factory) -> Path:
    return to_hf(hybrid, tmp_path_factory.mktemp("hybrid") / "export")


@pytest.fixture(scope="session")
def stacked_export(stacked, tmp_path_factory) -> Path:
    return to_hf(stacked, tmp_path_factory.mktemp("stacked") / "export")


def rms_norm(x, weight, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def softmax_attention(x, p, heads, groups):
    """x [L, D]; rotary embedding over the whole head, halves rotated; causal."""
    length, size = x.shape[0], x.shape[1] // heads
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, size, 2) / size)
    cos, sin = (torch.cat([f(angles)] * 2, -1).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))

    def project(name, count):
        return (x @ p[f"{name}_proj.weight"].t()).view(length, count, size)

    def rotate(y):
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    q, k, v = rotate(project("q", heads)), rotate(project("k", groups)), project("v", groups)
    k, v = (y.repeat_interleave(heads // groups, 1) for y in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) / size**0.5
    scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1) @ p["o_proj.weight"].t()


def memories(x, p, config):
    """x [L, D] through a MoM layer, from its tensors in the Hugging Face format."""
    groups = [f"{{}}_proj.{m}.weight" for m in range(config["num_memories"])]
    groups += ["shared_{}.weight"] if config["shared_mem"] else []
    parameters = {
        "router.weight": p["gate.weight"],
        "memory_proj": torch.stack([torch.cat([p[group.format(kind)] for kind in "kvba"]) for group in groups]),
        "q_proj.weight": p["q_proj.weight"],
        "gate_proj.weight": p["g_proj.weight"],
        "out_proj.weight": p["o_proj.weight"],
        "norm_weight": p["o_norm.weight"],
        "rule_parameters.A_log": p["A_log"],
        "rule_parameters.dt_bias": p["dt_bias"],
    } | {f"{name}_conv": p[f"{name}_conv1d.weight"][:, 0] for name in "qkv"}
    return mixture_of_memories_reference(
        x, parameters, num_heads=config["num_heads"], topk=config["topk"], shared=config["shared_mem"],
        norm_eps=config["norm_eps"],
    )  # fmt: skip


def reference_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [L, V] of an export for one sequence, in float64, without the code that exports or runs models."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.double() for name, tensor in read_weights(folder).items()}
    eps, attention = config["norm_eps"], config["attn"] or {"layers": []}
    x = weights["model.embeddings.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        p = {name.removeprefix(own): tensor for name, tensor in weights.items() if name.startswith(own)}
        mixer = {name.removeprefix("attn."): tensor for name, tensor in p.items() if name.startswith("attn.")}
        h = rms_norm(x, p["attn_norm.weight"], eps)
        if layer in attention["layers"]:
            x = x + softmax_attention(h, mixer, attention["num_heads"], attention["num_kv_heads"])
        else:
            x = x + memories(h, mixer, config)
        h = rms_norm(x, p["mlp_norm.weight"], eps)
        gate, up = h @ p["mlp.gate_proj.weight"].t(), h @ p["mlp.up_proj.weight"].t()
        x = x + (F.silu(gate) * up) @ p["mlp.down_proj.weight"].t()
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ weights.get("lm_head.weight", weights["model.embeddings.weight"]).t()


@pytest.mark.parametrize("name", ["hybrid", "stacked"])
def test_megatron_the_export_and_a_plain_loop_agree(name, request):
    """Megatron's model, the exported model, and plain loops over the exported tensors have the same logits."""
    checkpoint, export = request.getfixturevalue(name), request.getfixturevalue(f"{name}_export")
    vocabulary = json.loads((export / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(vocabulary, (1, 20), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(export, tokens[0])[None]
    megatron = megatron_logits(find_checkpoint(checkpoint, None), tokens, torch.bfloat16 if name == "stacked" else
                               torch.float32)[..., :vocabulary]  # fmt: skip
    assert compare(megatron, expected, tokens).relative < 1e-5
    assert compare(exported_logits(export, tokens), expected, tokens).relative < 1e-5


def test_verify_compares_the_export_with_megatron(hybrid, tmp_path, capsys, monkeypatch):
    to_hf(hybrid, tmp_path / "export", "--verify", "--verify-tokens", "16", "--dtype", "bfloat16")
    assert "verified on 2 x 16 tokens: logits" in capsys.readouterr().out
    monkeypatch.setattr("linear_moe.conversion.verify.compare", lambda *_: Difference(1.0, 0.5, 0.1))
    command = ["--load", str(hybrid), "--save", str(tmp_path / "other"), "--verify", "--verify-bound", "0.4"]
    assert convert_to_hf.main(command) == 1
    assert "differs from the checkpoint by more than 0.4:" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_another_layout_exports_the_same_bytes(hybrid_export, tmp_path):
    """The export is converted back, loaded on two stages, trained with a learning rate of zero, and exported."""
    release = from_hf(hybrid_export, tmp_path / "release")
    resaved = pretrain(
        tmp_path / "resaved", "--load", str(release), "--use-checkpoint-args", "--lr", "0", "--weight-decay", "0",
        "--pipeline-model-parallel-size", "2", processes=2,
    )  # fmt: skip
    again = to_hf(resaved, tmp_path / "again")
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert filecmp.cmp(hybrid_export / file, again / file, shallow=False), file


def test_experts_over_two_ranks_export_and_train_further(tmp_path):
    """Experts with a shared expert and bias-based balancing, softmax layers with norms, and multi-token prediction,
    trained with the experts and memories on two ranks. Megatron and the export have equal logits. Converted back, the
    model trains further on other ranks, and with a learning rate of zero its export has the same bytes."""
    experts = (
        "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-shared-expert-intermediate-size 20"
        " --moe-layer-freq [0,1] --moe-router-score-function sigmoid --moe-router-enable-expert-bias"
        " --moe-router-topk-scaling-factor 2.5 --moe-token-dispatcher-type alltoall --mtp-num-layers 1 --qk-layernorm"
        " --linear-attention-freq 2"
    ).split()
    trained = pretrain(
        tmp_path / "trained", *MODEL, *NULL_TOKENIZER, *experts, "--lr", "1e-2", "--expert-model-parallel-size", "2",
        "--no-save-optim", processes=2,
    )  # fmt: skip
    export = to_hf(trained, tmp_path / "export", "--verify", "--verify-tokens", "16")
    names = read_weights(export)
    assert names["model.layers.1.mlp.gate.e_score_correction_bias"].abs().max() > 0
    assert {"model.layers.1.mlp.experts.3.up_proj.weight", "model.mtp.0.layer.mlp.shared_expert.up_proj.weight",
            "model.mtp.0.layer.attn.q_norm.weight", "model.layers.0.mlp.up_proj.weight"} <= names.keys()  # fmt: skip
    release = from_hf(export, tmp_path / "release")
    resaved = pretrain(
        tmp_path / "resaved", *printed_options(release), *NULL_TOKENIZER, "--lr", "0", "--weight-decay", "0",
        "--moe-router-bias-update-rate", "0", "--no-save-optim",
    )  # fmt: skip
    again = to_hf(resaved, tmp_path / "again")
    assert same(read_weights(again), names)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (export, again))
    assert {key: value for key, value in before.items() if value != after[key]} == {}


EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 24 --moe-token-dispatcher-type alltoall --qk-layernorm"
).split()
LATENT = (
    "--multi-latent-attention --rope-type rope --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 16"
    " --qk-pos-emb-head-dim 8 --v-head-dim 12"
).split()
HYBRIDS = {
    "R-+ERE": LATENT,
    "R-*ERE/*E": ["--group-query-attention", "--num-query-groups", "2"],
}


@pytest.mark.parametrize("pattern", HYBRIDS if "MOM_ALL_LAYOUTS" in os.environ else ["R-+ERE"])
def test_hybrid_models_export_and_train_further(pattern, tmp_path):
    """A HybridModel with MoM, softmax and expert layers: equal logits, and the same weights on the way back."""
    shape = MODEL[2:]  # without --num-layers, which follows from the pattern
    options = [*NULL_TOKENIZER, "--no-save-optim"]
    trained = pretrain(
        tmp_path / "trained", *shape, *options, *EXPERTS, *HYBRIDS[pattern], "--hybrid-layer-pattern", pattern,
        "--lr", "1e-2",
    )  # fmt: skip
    export = to_hf(trained, tmp_path / "export", "--verify", "--verify-tokens", "16")
    release = from_hf(export, tmp_path / "release", "--hybrid")
    assert MegatronCheckpoint(release / "release").args.hybrid_layer_pattern == pattern
    resaved = pretrain(
        tmp_path / "resaved", *printed_options(release), "--lr", "0", "--weight-decay", "0", *options,
    )  # fmt: skip
    assert same(read_weights(to_hf(resaved, tmp_path / "again")), read_weights(export))


def test_export_is_complete(hybrid_export, tokenizer_folder):
    config = json.loads((hybrid_export / "config.json").read_text())
    assert config["vocab_size"] == 400  # Megatron padded it to 512
    assert config["attn"] == {
        "layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "rope_theta": 10000.0, "window_size": None,
    }  # fmt: skip
    assert config["norm_eps"] == 1e-5 and config["dtype"] == "float32" and not config["tie_word_embeddings"]
    generation = json.loads((hybrid_export / "generation_config.json").read_text())
    assert generation["pad_token_id"] == generation["eos_token_id"] == config["eos_token_id"]
    assert filecmp.cmp(tokenizer_folder / "tokenizer.json", hybrid_export / "tokenizer.json", shallow=False)
    settings = json.loads((hybrid_export / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["pad_token"] == settings["eos_token"]
    assert "backend" not in settings
    assert config["pad_token_id"] is None  # the embedding of the end-of-sequence token is trained
    card = (hybrid_export / "README.md").read_text()
    assert "arxiv:2502.13685" in card and f"linear-moe {__version__}, commit " in card
    assert "| tokens seen | 128 |" in card and "mock data" in card and "tensor 2" in card
    assert str(tokenizer_folder.parent) not in card
    assert (hybrid_export / "modeling_mom.py").is_file()
    assert oct((hybrid_export / "model.safetensors").stat().st_mode) == oct(
        (hybrid_export / "README.md").stat().st_mode
    )


def test_dtype_and_shard_size_are_chosen(stacked, stacked_export, tmp_path):
    stored = read_weights(stacked_export)
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.bfloat16} == {
        f"model.layers.{layer}.attn.{name}" for layer in range(2) for name in ("A_log", "dt_bias")
    }
    wide = to_hf(stacked, tmp_path / "wide", "--dtype", "float32", "--max-shard-size", "20KB")
    files = list(wide.glob("*.safetensors"))
    index = json.loads((wide / "model.safetensors.index.json").read_text())
    assert len(files) > 3 and set(index["weight_map"].values()) == {file.name for file in files}
    assert same(read_weights(wide), {name: tensor.float() for name, tensor in stored.items()})
    assert torch.equal(
        exported_logits(wide, torch.arange(9)[None]), exported_logits(stacked_export, torch.arange(9)[None])
    )


def test_an_iteration_chooses_one_checkpoint_of_several(stacked, stacked_export, tmp_path):
    by_iteration = to_hf(stacked, tmp_path / "number", "--iteration", "2")
    by_folder = to_hf(stacked / "iter_0000002", tmp_path / "folder")
    for export in (by_iteration, by_folder):
        assert filecmp.cmp(stacked_export / "model.safetensors", export / "model.safetensors", shallow=False)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_is_exact(settings, tmp_path):
    dtype = torch.bfloat16 if settings.get("attn") is None else torch.float32
    random_model(tmp_path / "model", dtype, eos_token_id=[2, 3], **settings)
    release = from_hf(tmp_path / "model", tmp_path / "release")
    # Megatron itself builds no single stage with softmax attention of both kinds.
    check = [] if isinstance(settings.get("attn"), list) else ["--verify", "--verify-tokens", "16"]
    export = to_hf(release, tmp_path / "export", *check)
    assert same(read_weights(tmp_path / "model"), read_weights(export))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("model", "export"))
    assert before["eos_token_id"] == after["eos_token_id"] == [2, 3]
    attention = settings.get("attn") or {}
    hybrid = [] if "rope_scaling" in attention and "kv_lora_rank" not in attention else ["--hybrid"]
    again = to_hf(from_hf(export, tmp_path / "release again", *hybrid), tmp_path / "again", *check)
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        assert filecmp.cmp(export / file, again / file, shallow=False)


def test_older_formats_of_weights_and_arguments_are_read(tmp_path):
    """Pickled weights, and Megatron's common.pt."""
    model = random_model(tmp_path / "model")
    (tmp_path / "pickled").mkdir()
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    release = from_hf(tmp_path / "pickled", tmp_path / "release") / "release"
    args = MegatronCheckpoint(release).args
    args.optimizer = "adam of the file"
    torch.save({"args": args, "iteration": 12}, release / "common.pt")
    checkpoint = MegatronCheckpoint(release)
    assert checkpoint.iteration == 12 and checkpoint.args.optimizer == "adam of the file"
    assert same(read_weights(to_hf(release, tmp_path / "export")), read_weights(tmp_path / "model"))
