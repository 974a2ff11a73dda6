"""The name table: names and shapes of the format, the order of rows in fused projections, and exact round trips."""

import json

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from safetensors.torch import load_file, save_file

from linear_moe.conversion import attention_arguments
from linear_moe.conversion.config import arguments_from_config, config_from_arguments, layout_of, parse_config
from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.layers import kinds_of_config
from linear_moe.conversion.loading import load_model
from linear_moe.conversion.names import QKV, entries
from mom_layers import rule_names
from mom_layers.hf import MomConfig, MomForCausalLM

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "vocab_size": 40, "num_memories": 2, "topk": 1, "max_position_embeddings": 64,
}  # fmt: skip
ALONE = {"num_memories": 0, "topk": 0}

LLAMA3 = {"rope_type": "llama3", "factor": 8.0} | attention_arguments.LLAMA3
YARN = {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.7} | attention_arguments.YARN
LATENT = {
    "num_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "qk_norm": True,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24, "aux_loss_scale": 0.01}

VARIANTS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "one memory": {"num_memories": 1},
    "eight memories": {"num_memories": 8, "topk": 2},
    "no shared memory": {"shared_mem": False, "expand_v": 2.0},
    "one projection": {"single_kv_proj": True},
    "one projection, no shared memory": {"single_kv_proj": True, "shared_mem": False, "conv_size": 3},
    "no convolution": {"conv_size": 1},
    "convolution over the text": {"text_conv_size": 3, "shared_mem": False},
    **{f"rule {name}": {"mom_backend": name} for name in rule_names()},
    **{f"{rule} alone": ALONE | {"mom_backend": rule} for rule in rule_names()},
    "hybrid of one memory": ALONE | {"attn": {"layers": [1], "num_heads": 4}, "mom_backend": "gated_deltanet"},
    "hybrid": {"attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2}},
    "softmax alone": {
        "attn": {
            "layers": [0, 1], "num_heads": 2, "num_kv_heads": 1, "head_dim": 24, "qk_norm": True, "qkv_bias": True,
        },
    },
    "scaled positions": {
        "attn": {"layers": [1], "num_heads": 2, "rope_scaling": LLAMA3},
    },
    "multi-latent attention": {"attn": LATENT | {"layers": [1]}},
    "multi-latent attention without norms": {
        "attn": LATENT | {"layers": [0], "qk_norm": False, "q_lora_rank": None, "rope_scaling": YARN},
    },
    "experts": {"moe": EXPERTS | {"layers": [0, 1]}},
    "shared expert and bias": {
        "moe": EXPERTS | {
            "layers": [1], "shared_expert_intermediate_size": 20, "shared_expert_gate": True, "expert_bias": True,
            "score_function": "sigmoid", "routed_scaling_factor": 2.5,
        },
    },
    "groups of experts": {
        "moe": EXPERTS | {"layers": [0, 1], "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
        "tie_word_embeddings": True,
    },
    "every kind of layer": {
        "num_hidden_layers": 4,
        "attn": [
            {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "rope_theta": None},
            LATENT | {"layers": [2]},
        ],
        "moe": EXPERTS | {"layers": [0, 3], "shared_expert_intermediate_size": 20},
    },
    "multi-token prediction": {
        "num_nextn_predict_layers": 2,
        "attn": {"layers": [2, 3], "num_heads": 4, "num_kv_heads": 2},
        "moe": EXPERTS | {"layers": [1, 2, 3]},
    },
    "multi-token prediction with memories": {"num_nextn_predict_layers": 1},
    "hybrid with windows": {
        "attn": {"layers": [0], "num_heads": 2, "window_size": 8, "rope_theta": 500.0}, "tie_word_embeddings": True,
    },
}  # fmt: skip


def random_model(folder, dtype=torch.float32, **settings) -> MomForCausalLM:
    """Saves a model with random weights, norms and convolutions included, as transformers does."""
    torch.manual_seed(0)
    model = MomForCausalLM(MomConfig(**(TINY | settings)))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    model.to(dtype).save_pretrained(folder)
    return model


def read_weights(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def older_content(**settings) -> dict:
    """config.json as OpenSparseLLMs/MoM writes it."""
    sizes = {name: value for name, value in TINY.items() if name not in ("num_memories",)}
    older = {"num_experts": 2, "shared_mem": True, "single_expert": False, "use_gate": True, "norm_first": False}
    return sizes | older | {"expand_v": 1, "capacity": 1.0, "model_type": "mom_gated_deltanet"} | settings


def layout(**settings):
    return layout_of(MomConfig(**(TINY | settings)))


def test_names_and_shapes_are_those_of_the_format():
    found = dict(pair for entry in entries(layout(num_hidden_layers=1)) for pair in entry.hf)
    keys, hidden, heads = 32, 32, 2
    expected = {
        "model.embeddings.weight": (40, hidden),
        "model.layers.0.attn_norm.weight": (hidden,),
        "model.layers.0.attn.gate.weight": (2, hidden),
        "model.layers.0.attn.q_proj.weight": (keys, hidden),
        "model.layers.0.attn.k_proj.0.weight": (keys, hidden),
        "model.layers.0.attn.k_proj.1.weight": (keys, hidden),
        "model.layers.0.attn.shared_k.weight": (keys, hidden),
        "model.layers.0.attn.v_proj.0.weight": (keys, hidden),
        "model.layers.0.attn.v_proj.1.weight": (keys, hidden),
        "model.layers.0.attn.shared_v.weight": (keys, hidden),
        "model.layers.0.attn.b_proj.0.weight": (heads, hidden),
        "model.layers.0.attn.b_proj.1.weight": (heads, hidden),
        "model.layers.0.attn.shared_b.weight": (heads, hidden),
        "model.layers.0.attn.a_proj.0.weight": (heads, hidden),
        "model.layers.0.attn.a_proj.1.weight": (heads, hidden),
        "model.layers.0.attn.shared_a.weight": (heads, hidden),
        "model.layers.0.attn.A_log": (heads,),
        "model.layers.0.attn.dt_bias": (heads,),
        "model.layers.0.attn.q_conv1d.weight": (keys, 1, 4),
        "model.layers.0.attn.k_conv1d.weight": (keys, 1, 4),
        "model.layers.0.attn.v_conv1d.weight": (keys, 1, 4),
        "model.layers.0.attn.g_proj.weight": (keys, hidden),
        "model.layers.0.attn.o_norm.weight": (16,),
        "model.layers.0.attn.o_proj.weight": (hidden, keys),
        "model.layers.0.mlp_norm.weight": (hidden,),
        "model.layers.0.mlp.gate_proj.weight": (48, hidden),
        "model.layers.0.mlp.up_proj.weight": (48, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, 48),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (40, hidden),
    }
    assert found == expected


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_table_describes_the_models_tensors(settings):
    model = MomForCausalLM(MomConfig(**(TINY | settings)))
    held = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if settings.get("tie_word_embeddings"):
        held.pop("lm_head.weight")
    assert dict(pair for entry in entries(layout(**settings)) for pair in entry.hf) == held


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_split_undoes_join(settings):
    for entry in entries(layout(**settings)):
        parts = [torch.randn(shape) for _, shape in entry.hf]
        joined = entry.join(parts)
        assert joined.shape == entry.shape
        again = entry.split(joined)
        assert len(again) == len(parts) and all(map(torch.equal, again, parts)), entry.row.megatron


def test_fused_attention_projection_has_megatrons_order():
    """Four query heads in two groups, of size 1: q1 q2 k1 v1 | q3 q4 k2 v2."""
    two_groups = layout(hidden_size=4, attn={"layers": [1], "num_heads": 2, "num_kv_heads": 2})
    q, k, v = (torch.arange(4.0)[:, None].expand(4, 4) + first for first in (0, 100, 200))
    rows = QKV.join([q, k, v], two_groups)[:, 0].tolist()
    assert rows == [0, 1, 100, 101, 200, 201, 2, 3, 102, 103, 202, 203]


# Configurations that do not name the rule are older than all rules but one.
OLD_VARIANTS = {name: settings for name, settings in VARIANTS.items() if "mom_backend" not in settings}


@pytest.mark.parametrize("settings", OLD_VARIANTS.values(), ids=OLD_VARIANTS)
def test_older_configurations_are_completed_from_the_tensors(settings, tmp_path):
    model = random_model(tmp_path, **settings)
    content = json.loads((tmp_path / "config.json").read_text())
    for key in ("single_kv_proj", "shared_mem", "mom_backend", "attnres_block_size", "use_layer_wise_balance"):
        content.pop(key, None)
    config = parse_config(content, set(model.state_dict()))
    assert config.single_kv_proj == model.config.single_kv_proj
    if not config.single_kv_proj:  # with one projection the shared memory has no tensors of its own
        assert config.shared_mem == model.config.shared_mem


@pytest.mark.parametrize(
    ("layers", "expected"), [([], None), ([1, 3], 2), ([3], 4), ([0, 2], [0, 1, 0, 1]), ([1, 2], [1, 0, 0, 1])]
)
def test_layer_pattern(layers, expected):
    attention = {"layers": layers, "num_heads": 2} if layers else None
    args = arguments_from_config(MomConfig(**(TINY | {"num_hidden_layers": 4, "attn": attention})))
    assert args.linear_attention_freq == expected


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"use_output_gate": False}, "use_output_gate"),
        ({"attnres_block_size": 4}, "attnres_block_size"),
        ({"topk": 3}, "topk"),
    ],
)
def test_configurations_of_other_models_are_refused(settings, word):
    with pytest.raises(ConversionError, match=word):
        parse_config({"model_type": "mom"} | TINY | settings, set())


@pytest.mark.parametrize("settings", [{"num_memories": 4, "topk": 2, "num_hidden_layers": 3}, VARIANTS["hybrid"]])
def test_the_balancing_loss_weighs_the_same_in_both_formats(settings):
    config = MomConfig(**(TINY | settings), aux_loss_scale=0.03)
    args = arguments_from_config(config)
    layers = config.num_mom_layers
    logits = [torch.randn(50, config.num_memories, generator=torch.Generator().manual_seed(i)) for i in range(layers)]
    theirs = config.aux_loss_scale * MomForCausalLM(config)._balancing_loss(tuple(logits), None)
    ours = 0.0
    for one in logits:
        chosen = torch.zeros_like(one).scatter(1, one.topk(config.topk).indices, 1.0)
        ours += switch_load_balancing_loss_func(
            one.softmax(1), chosen.sum(0), len(one), config.topk, config.num_memories, args.mom_aux_loss_coeff
        )
    torch.testing.assert_close(ours, theirs)
    assert config_from_arguments(args, kinds_of_config(config), config.vocab_size, {})["aux_loss_scale"] == 0.03


def test_configurations_of_the_older_repository(tmp_path):
    config = parse_config(older_content(num_experts=4, topk=2), set())
    assert (config.num_memories, config.topk, config.shared_mem, config.model_type) == (4, 2, True, "mom")
    only_type = parse_config({"model_type": "mom_gated_deltanet"}, set())
    assert (only_type.num_memories, only_type.expand_v, only_type.shared_mem, only_type.num_heads) == (8, 2, False, 6)
    with pytest.raises(ConversionError, match="norm_first must be false"):
        parse_config(older_content(norm_first=True), set())
    with pytest.raises(ConversionError, match="use_output_gate"):
        parse_config(older_content(use_gate=False), set())

    model = random_model(tmp_path)
    weights = read_weights(tmp_path)
    weights |= {f"model.layers.{layer}.attn.D": torch.ones(2) for layer in range(2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(older_content()))
    loaded = load_model(tmp_path)
    assert same(loaded.state_dict(), model.state_dict())
