"""Transformers that exist as models with memories: equal logits of softmax layers, and where MoM layers start."""

import json
import re

import numpy
import pytest
import torch
from test_convert_names import read_weights
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from linear_moe.commands import convert_from_hf, convert_to_hf
from linear_moe.conversion import alignment, config
from linear_moe.conversion.checkpoint import MegatronCheckpoint
from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.memories_from_softmax import STARTS, chosen_layers
from linear_moe.conversion.transformer_folders import ARCHITECTURES
from mom_layers.hf import MomForCausalLM
from mom_layers.recur.rules import get_rule, rule_names

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_experts": 4}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
TRANSFORMERS = {
    "llama": LlamaConfig(**SIZES, head_dim=16),
    "llama 3.1": LlamaConfig(**SIZES, head_dim=16, rope_scaling=LLAMA3 | {"rope_theta": 500000.0}),
    "mistral": MistralConfig(**SIZES, head_dim=16, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, head_dim=16, num_experts_per_tok=2, num_local_experts=4),
    "qwen2 moe": Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=40, mlp_only_layers=[0]),
    "qwen3 moe": Qwen3MoeConfig(**SIZES, **MOE, head_dim=16, norm_topk_prob=True),
}


def save(config, folder, dtype=torch.float32):
    """Saves a Transformer with random weights, norms and biases included, as transformers does."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return model


def convert(folder, target, *options) -> int:
    return convert_from_hf.main(["--load", str(folder), "--save", str(target), *options])


def export(checkpoint, folder, *options):
    assert convert_to_hf.main(["--load", str(checkpoint), "--save", str(folder), *options]) == 0
    return folder


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_a_model_of_softmax_layers_has_the_transformers_logits(name, tmp_path, capsys):
    """Through Megatron's checkpoint, whose own model agrees (--verify), and back."""
    model = save(TRANSFORMERS[name], tmp_path / "transformer")
    assert convert(tmp_path / "transformer", tmp_path / "megatron", "--softmax-layers", "all") == 0
    assert MegatronCheckpoint(tmp_path / "megatron" / "release").args.token_mixer == "attention"
    export(tmp_path / "megatron", tmp_path / "export", "--verify", "--verify-tokens", "24")
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    found = MomForCausalLM.from_pretrained(tmp_path / "export").eval()(tokens).logits
    torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "qwen3 moe"])
@torch.no_grad()
def test_memories_start_from_the_softmax_layers(name, tmp_path, capsys):
    """All but every fourth layer: embeddings, norms, MLPs and the layers that stay are as they are, and the new layers
    add nothing at first, so that the hidden states are those of the Transformer without these layers' attention."""
    model = save(TRANSFORMERS[name], tmp_path / "transformer")
    assert convert(tmp_path / "transformer", tmp_path / "megatron", "--mom-num-memories", "3") == 0
    said = capsys.readouterr().out
    assert "3 of 4 layers become MoM layers with 3 memories; softmax attention stays in 3" in said
    assert "linear_moe.pretrain --load" in said
    export(tmp_path / "megatron", tmp_path / "export", "--verify", "--verify-tokens", "24")
    before, after = read_weights(tmp_path / "transformer"), read_weights(tmp_path / "export")
    kept = {new: old for new in after if (old := old_name(new)) in before and not re.search(r"[012]\.attn\.[kvq]", new)}
    assert len(kept) >= 30 and all(torch.equal(after[new], before[old]) for new, old in kept.items())

    norm = before.get("model.layers.0.self_attn.k_norm.weight")
    keys = before["model.layers.0.self_attn.k_proj.weight"].view(2, 16, 32)
    keys = keys if norm is None else keys * norm[:, None]
    keys = keys.repeat_interleave(2, 0).flatten(0, 1)
    for memory in range(3):
        assert torch.equal(after[f"model.layers.0.attn.k_proj.{memory}.weight"], keys)
    assert torch.equal(after["model.layers.0.attn.shared_k.weight"], keys)
    assert not after["model.layers.0.attn.k_conv1d.weight"][..., :-1].any()
    assert (after["model.layers.0.attn.k_conv1d.weight"][..., -1] > 0).all()
    rate = after["model.layers.0.attn.A_log"].exp() * torch.nn.functional.softplus(after["model.layers.0.attn.dt_bias"])
    assert (rate < 0.011).all() and not after["model.layers.0.attn.b_proj.0.weight"].any()
    assert 0 < after["model.layers.0.attn.gate.weight"].abs().max() < 0.01

    for layer in model.model.layers[:3]:
        layer.self_attn.o_proj.weight.zero_()
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))
    found = MomForCausalLM.from_pretrained(tmp_path / "export").eval()(tokens, output_hidden_states=True)
    expected = model(tokens, output_hidden_states=True)
    for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_architecture_is_tested_and_named():
    assert set(ARCHITECTURES) == set(config.TRANSFORMERS) == {one.model_type for one in TRANSFORMERS.values()}


def old_name(name: str) -> str:
    for here, there in (
        (".attn_norm.", ".input_layernorm."), (".mlp_norm.", ".post_attention_layernorm."), (".attn.", ".self_attn."),
        ("model.embeddings.", "model.embed_tokens."),
    ):  # fmt: skip
        name = name.replace(here, there)
    return name


def test_every_part_of_a_new_layer_learns(tmp_path):
    """Once the gate has opened, no weight of a new layer is without a gradient."""
    save(TRANSFORMERS["qwen3"], tmp_path / "transformer")
    assert convert(tmp_path / "transformer", tmp_path / "megatron", "--softmax-layers", "3") == 0
    model = MomForCausalLM.from_pretrained(export(tmp_path / "megatron", tmp_path / "export"))
    tokens = torch.randint(96, (4, 32), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    mixer = model.model.layers[0].attn
    assert losses[-1] < losses[0] - 0.1
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in mixer.parameters())


@pytest.mark.parametrize("rule", [name for name in rule_names() if get_rule(name).key_heads is None])
def test_other_rules_start_too(rule, tmp_path):
    save(TRANSFORMERS["llama"], tmp_path / "transformer", torch.bfloat16)
    assert convert(tmp_path / "transformer", tmp_path / "megatron", "--softmax-layers", "none", "--mom-rule", rule) == 0
    export(tmp_path / "megatron", tmp_path / "export", "--verify", "--verify-tokens", "24")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["mom_backend"] == rule
    gates = [f".attn.{gate.hf}_proj." for gate in get_rule(rule).raw_gates]
    drawn = [t for name, t in read_weights(tmp_path / "export").items() if any(gate in name for gate in gates)]
    assert not any(tensor.any() for tensor in drawn) or rule not in STARTS


def test_one_memory_alone_starts_too(tmp_path):
    save(TRANSFORMERS["qwen3"], tmp_path / "transformer")
    alone = ["--mom-num-memories", "0", "--mom-topk", "0"]
    assert convert(tmp_path / "transformer", tmp_path / "megatron", "--softmax-layers", "3", *alone) == 0
    export(tmp_path / "megatron", tmp_path / "export", "--verify", "--verify-tokens", "24")
    after = read_weights(tmp_path / "export")
    assert after["model.layers.0.attn.k_proj.weight"].shape == (64, 32)
    assert not after["model.layers.0.attn.g_proj.weight"].any()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((None, None), [3, 7]), (("all", None), list(range(8))), (("none", None), []), (("every-3", None), [2, 5]),
        (("0,5", None), [0, 5]), ((None, "all"), []), ((None, "1,2,3,4,5,6"), [0, 7]),
    ],
)  # fmt: skip
def test_layers_are_chosen(words, expected):
    assert chosen_layers(*words, 8) == expected


@pytest.mark.parametrize("word", ["some", "every-0", "every-", "8", "1,,2", "-1"])
def test_other_words_for_layers_are_refused(word):
    with pytest.raises(ConversionError, match="--softmax-layers"):
        chosen_layers(word, None, 8)


@pytest.mark.parametrize(
    ("changed", "options", "words"),
    [
        ({"model_type": "gpt2"}, [], "model_type 'gpt2'; convert_from_hf.py also takes Transformers, llama, mistral"),
        ({"head_dim": 12}, [], "have size 12, and the kernels of --mom-rule gated_deltanet take 16, 32"),
        ({"hidden_act": "gelu"}, [], "hidden_act must be silu or swish"),
        ({"attention_bias": True}, [], "attention_bias must be false"),
        ({"num_hidden_layers": 10**9}, [], "num_hidden_layers 1000000000, and the weights have only"),
        ({"num_hidden_layers": 3}, [], "the weights have model.layers.3.input_layernorm.weight"),
        ({"intermediate_size": 40}, [], "mlp.gate_proj.weight is [48, 32], and config.json makes it [40, 32]"),
        ({"rope_parameters": {"rope_type": "longrope"}}, [], "config.json"),
        ({}, ["--softmax-layers", "9"], "--softmax-layers 9: the model has the layers 0 to 3"),
        ({}, ["--mom-topk", "5"], "topk must be between 1 and the number of memories (4), got 5"),
        ({}, ["--mom-rule", "nothing"], "nothing"),
    ],
)  # fmt: skip
def test_what_no_model_with_memories_can_start_from(changed, options, words, tmp_path, capsys):
    save(TRANSFORMERS["llama"], tmp_path / "transformer")
    path = tmp_path / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert convert(tmp_path / "transformer", tmp_path / "megatron", *options) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("convert_from_hf.py: error: ") and words in line, line
    assert not (tmp_path / "megatron").exists()


def test_a_token_of_another_tokenizer_is_named_wherever_it_stands(tmp_path, monkeypatch):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=numpy.uint16)
    builder.add_document(torch.tensor([1, 2, 3, 4, 5, 96]), [6])
    builder.finalize(str(tmp_path / "corpus.idx"))
    words = "has the token 96, and the model 96 tokens"
    with pytest.raises(ConversionError, match=words):
        alignment.Windows(tmp_path / "corpus", 1, 6, 96, 0)
    monkeypatch.setattr(alignment, "CHECKED", 5)
    with pytest.raises(ConversionError, match=words):
        alignment.Windows(tmp_path / "corpus", 1, 6, 96, 0).draw()


def test_mixers_learn_the_attention_alone(tmp_path, capsys):
    """The error against the Transformer's attention falls, every other weight stays, and Megatron reads the result."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from linear_moe.commands import align_mixers

    save(TRANSFORMERS["qwen3"], tmp_path / "transformer")
    builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=numpy.uint16)
    for row in torch.randint(96, (40, 33), generator=torch.Generator().manual_seed(0)):
        builder.add_document(row, [len(row)])
    builder.finalize(str(tmp_path / "corpus.idx"))
    words = ["--load", tmp_path / "transformer", "--save", tmp_path / "aligned", "--data-path", tmp_path / "corpus"]
    words += ["--steps", 30, "--batch-size", 4, "--seq-length", 32, "--lr", "5e-3", "--device", "cpu"]
    assert align_mixers.main([*map(str, words), "--mom-layers", "0,2"]) == 0
    errors = [float(value) for value in re.findall(r"error ([\d.]+) of", capsys.readouterr().out)]
    assert errors[-1] < 0.85 * errors[0] < 1, errors
    before, after = read_weights(tmp_path / "transformer"), read_weights(tmp_path / "aligned")
    kept = [name for name in after if not re.search(r"layers\.[02]\.attn\.", name) and old_name(name) in before]
    assert len(kept) > 20 and all(torch.equal(after[name], before[old_name(name)]) for name in kept)
    assert convert(tmp_path / "aligned", tmp_path / "megatron") == 0
    exported = read_weights(export(tmp_path / "megatron", tmp_path / "export", "--verify", "--verify-tokens", "24"))
    assert all(torch.equal(exported[name], tensor) for name, tensor in after.items())
    assert align_mixers.main([*map(str, words), "--overwrite", "--softmax-layers", "all"]) == 1
    assert "no layer becomes a MoM layer" in capsys.readouterr().err
