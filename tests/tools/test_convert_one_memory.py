"""Models of one memory alone between Megatron, our format and the types of flash-linear-attention."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_convert_checkpoints import MODEL, NULL_TOKENIZER, from_hf, pretrain, to_hf
from test_convert_names import ALONE, random_model, read_weights, same

from linear_moe.commands import convert_from_hf, convert_to_hf
from linear_moe.conversion.fla_types import NEVER, TYPES
from mom_layers import rule_names
from mom_layers.hf import MomForCausalLM
from mom_layers.recur.rules.gla import gated_linear_attention_reference

FLA = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 48, "vocab_size": 40,
    "max_position_embeddings": 64, "hidden_ratio": None, "norm_eps": 1e-6, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
CONTENT = {
    "gated_deltanet": {"head_dim": 16, "expand_v": 1.0},
    "gla": {"expand_k": 0.5, "expand_v": 1.0, "use_short_conv": True},
    "delta_net": {"expand_k": 1.0, "expand_v": 1.0, "use_gate": True},
}
HERE = [name for name, kind in TYPES.items() if kind.rule in rule_names()]


def fla_folder(folder, model_type, **changes):
    """A folder as flash-linear-attention saves it, with random weights."""
    content = FLA | CONTENT[model_type] | {"model_type": model_type} | changes
    keys = values = 32 if model_type != "gla" else 16
    values = 32
    attn = {
        "q_proj.weight": (keys, 32), "k_proj.weight": (keys, 32), "v_proj.weight": (values, 32),
        "g_proj.weight": (values, 32), "o_proj.weight": (32, values),
        "q_conv1d.weight": (keys, 1, 4), "k_conv1d.weight": (keys, 1, 4), "v_conv1d.weight": (values, 1, 4),
    }  # fmt: skip
    if model_type == "gla":
        attn |= {"gk_proj.0.weight": (16, 32), "gk_proj.1.weight": (keys, 16), "gk_proj.1.bias": (keys,)}
        attn |= {"g_norm_swish_gate.weight": (16,)}
    else:
        attn |= {"b_proj.weight": (2, 32), "o_norm.weight": (16,)}
    if model_type == "gated_deltanet":
        attn |= {"a_proj.weight": (2, 32), "A_log": (2,), "dt_bias": (2,)}
    shapes = {"model.embeddings.weight": (40, 32), "model.norm.weight": (32,), "lm_head.weight": (40, 32)}
    for layer in range(2):
        shapes |= {f"model.layers.{layer}.attn.{name}": shape for name, shape in attn.items()}
        shapes |= {f"model.layers.{layer}.{name}.weight": (32,) for name in ("attn_norm", "mlp_norm")}
        for name, shape in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48))):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    tensors = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(content))
    return tensors


@pytest.mark.parametrize("rule", rule_names())
def test_to_megatron_and_back_to_the_bit(rule, tmp_path):
    model = random_model(tmp_path / "hf", **ALONE, mom_backend=rule)
    back = to_hf(from_hf(tmp_path / "hf", tmp_path / "megatron"), tmp_path / "again")
    assert same(read_weights(back), model.state_dict())
    content = json.loads((back / "config.json").read_text())
    assert (content["num_memories"], content["topk"], content["mom_backend"]) == (0, 0, rule)
    again = MomForCausalLM.from_pretrained(back).eval()
    tokens = torch.arange(1, 10)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model.eval()(tokens).logits)


def test_a_trained_checkpoint_is_exported_verified_and_imported(tmp_path):
    """Two ranks share every layer; Megatron's logits are the export's."""
    words = [word if word != "mom" else "gated_deltanet" for word in MODEL]
    saved = pretrain(
        tmp_path / "trained", *words, *NULL_TOKENIZER, "--lr", "1e-2", "--tensor-model-parallel-size", "2",
        "--sequence-parallel", processes=2,
    )  # fmt: skip
    export = to_hf(saved, tmp_path / "export", "--verify")
    assert "one memory state each" in (export / "README.md").read_text()
    again = to_hf(from_hf(export, tmp_path / "back"), tmp_path / "again")
    assert same(read_weights(again), read_weights(export))
    theirs = to_hf(saved, tmp_path / "theirs", "--model-type", "gated_deltanet")
    content = json.loads((theirs / "config.json").read_text())
    assert content["model_type"] == "gated_deltanet" and content["architectures"] == ["GatedDeltaNetForCausalLM"]
    assert same(read_weights(theirs), read_weights(export))


@pytest.mark.parametrize("model_type", HERE)
def test_flas_types_come_in_and_go_out_to_the_bit(model_type, tmp_path):
    tensors = fla_folder(tmp_path / "fla", model_type)
    megatron = from_hf(tmp_path / "fla", tmp_path / "megatron")
    back = to_hf(megatron, tmp_path / "back", "--model-type", model_type)
    assert same(read_weights(back), tensors)
    given, found = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "fla", back))
    assert {key: found[key] for key in given} == given


def test_a_gla_model_of_fla_computes_the_same(tmp_path):
    """Its layer written out: the low-rank gate of all heads together, convolutions, norm and gate."""
    tensors = fla_folder(tmp_path / "fla", "gla")
    mom = to_hf(from_hf(tmp_path / "fla", tmp_path / "megatron"), tmp_path / "mom")
    attn = MomForCausalLM.from_pretrained(mom).model.layers[1].attn
    p = {name.removeprefix("model.layers.1.attn."): t for name, t in tensors.items() if ".layers.1.attn." in name}
    x = torch.randn(9, 32)

    def convolved(letter):
        y = F.pad((x @ p[f"{letter}_proj.weight"].t()).t()[None], (3, 0))
        weight = p[f"{letter}_conv1d.weight"]
        return F.silu(F.conv1d(y, weight, groups=len(weight)))[0].t().reshape(9, 2, -1)

    gk = F.logsigmoid(x @ p["gk_proj.0.weight"].t() @ p["gk_proj.1.weight"].t() + p["gk_proj.1.bias"]) / 16
    q, k, v = (convolved(letter) for letter in "qkv")
    o, _ = gated_linear_attention_reference(q, k, v, gk.view(9, 2, 8), torch.tensor([0, 9]))
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * p["g_norm_swish_gate.weight"]
    o = o.flatten(1) * F.silu(x @ p["g_proj.weight"].t())
    from mom_layers.hf.sequence import TokenSequence

    got, _ = attn(x[None], TokenSequence(1, 9, 0, x.device, None, None, None, False, None))
    torch.testing.assert_close(got[0], o @ p["o_proj.weight"].t(), rtol=1e-4, atol=1e-5)


REFUSED = [(name, only) for name in HERE for only in TYPES[name].only if only.reason]


@pytest.mark.parametrize("model_type,only", REFUSED, ids=[f"{name}-{only.key}" for name, only in REFUSED])
def test_blocks_that_differ_are_refused_with_the_reason(model_type, only, tmp_path, capsys):
    other = {"num_heads": 7, "l2": "sum", "silu": "relu"}.get(only.accepted[-1], "x")
    other = not only.accepted[0] if isinstance(only.accepted[0], bool) else other
    fla_folder(tmp_path / "fla", model_type, **{only.key: other})
    assert convert_from_hf.main(["--load", str(tmp_path / "fla"), "--save", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err
    assert only.key in message and only.reason in message and message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", NEVER)
def test_types_whose_blocks_are_not_ours_are_refused(model_type, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(FLA | {"model_type": model_type}))
    assert convert_from_hf.main(["--load", str(tmp_path), "--save", str(tmp_path / "out")]) == 1
    assert NEVER[model_type] in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings,model_type,message",
    [
        ({}, "gated_deltanet", "holds one memory alone, and this model has routed memories"),
        (ALONE, "gla", "holds the update rule gla, and this model has gated_deltanet"),
        (ALONE, "kda", "cannot be converted"),
        (ALONE, "llama", "--model-type must be mom or one of gated_deltanet, gla"),
        (ALONE | {"mom_backend": "gla"}, "gla", "low-rank projection for each head here"),
        (ALONE | {"mom_backend": "gla", "conv_size": 1}, "gla", "no SiLU without a convolution"),
    ],
)
def test_exports_that_the_type_cannot_hold_are_refused(settings, model_type, message, tmp_path, capsys):
    random_model(tmp_path / "hf", **settings)
    megatron = from_hf(tmp_path / "hf", tmp_path / "megatron")
    words = ["--load", str(megatron), "--save", str(tmp_path / "out"), "--model-type", model_type]
    assert convert_to_hf.main(words) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
