import pytest
import torch
from hf_models import tiny_config, tiny_model

from mom_layers.hf import MomConfig, MomForCausalLM
from mom_layers.recur.rules import get_rule, rule_names

# From the configuration of fla.models.mom (flash-linear-attention 0.6.0).
FLA_DEFAULTS = {
    "attn_mode": "chunk", "hidden_size": 2048, "conv_size": 4, "num_heads": 4, "head_dim": 256, "expand_v": 1.0,
    "use_output_gate": True, "use_short_conv": True, "max_position_embeddings": 2048, "hidden_ratio": 4,
    "intermediate_size": None, "hidden_act": "swish", "num_hidden_layers": 24, "norm_eps": 1e-6, "attn": None,
    "use_cache": True, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "initializer_range": 0.02, "num_memories": 4, "topk": 2, "capacity": 1.0, "use_layer_wise_balance": True,
    "aux_loss_scale": 0.01, "shared_mem": True, "single_kv_proj": False, "mom_backend": "gated_deltanet",
    "fuse_norm": True, "fuse_swiglu": True, "fuse_cross_entropy": True, "vocab_size": 32000, "attnres_block_size": None,
}  # fmt: skip
KEYS, VALUES, HEADS, HIDDEN, WIDTH = 16, 32, 2, 32, 4
MIXER = {
    "q_proj.weight": (KEYS, HIDDEN), "gate.weight": (4, HIDDEN),
    "g_proj.weight": (VALUES, HIDDEN), "o_proj.weight": (HIDDEN, VALUES), "o_norm.weight": (VALUES // HEADS,),
    "q_conv1d.weight": (KEYS, 1, WIDTH), "k_conv1d.weight": (KEYS, 1, WIDTH), "v_conv1d.weight": (VALUES, 1, WIDTH),
    "A_log": (HEADS,), "dt_bias": (HEADS,),
}  # fmt: skip
SEPARATE = {
    f"{letter}_proj.{memory}.weight": (size, HIDDEN)
    for letter, size in (("k", KEYS), ("v", VALUES), ("b", HEADS), ("a", HEADS))
    for memory in range(4)
}
SHARED = {f"shared_{x}.weight": (s, HIDDEN) for x, s in (("k", KEYS), ("v", VALUES), ("b", HEADS), ("a", HEADS))}


def test_keys_and_defaults_are_those_of_the_format():
    config = MomConfig().to_dict()
    assert {key: config[key] for key in FLA_DEFAULTS} == FLA_DEFAULTS
    assert config["model_type"] == "mom"


MOE = {"layers": [0, 1], "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, MIXER | SEPARATE | SHARED),
        ({"shared_mem": False}, MIXER | SEPARATE),
        ({"single_kv_proj": True}, MIXER | SHARED),
        ({"single_kv_proj": True, "shared_mem": False}, MIXER | SHARED),
        ({"text_conv_size": 3}, MIXER | SEPARATE | SHARED | {"text_conv1d.weight": (HIDDEN, 1, 3)}),
    ],
)
def test_parameter_names_and_shapes_are_those_of_the_format(changes, expected):
    expected = {f"model.layers.{i}.attn.{name}": shape for i in range(2) for name, shape in expected.items()}
    for i in range(2):
        expected |= {f"model.layers.{i}.{norm}.weight": (HIDDEN,) for norm in ("attn_norm", "mlp_norm")}
        expected |= {f"model.layers.{i}.mlp.{name}_proj.weight": (48, HIDDEN) for name in ("gate", "up")}
        expected[f"model.layers.{i}.mlp.down_proj.weight"] = (HIDDEN, 48)
    expected |= {name: (61, HIDDEN) for name in ("model.embeddings.weight", "lm_head.weight")}
    expected["model.norm.weight"] = (HIDDEN,)
    assert {name: tuple(value.shape) for name, value in tiny_model(**changes).state_dict().items()} == expected


@pytest.mark.parametrize("rule", rule_names())
def test_parameter_names_follow_the_rule(rule):
    """A model has a projection for each raw gate and memory, and the rule's own parameters in float32."""
    model = tiny_model(mom_backend=rule).bfloat16()
    layer, update = model.model.layers[0].attn, get_rule(rule)
    for gate in update.raw_gates:
        for linear in (*getattr(layer, f"{gate.hf}_proj"), getattr(layer, f"shared_{gate.hf}")):
            assert linear.weight.shape == (HEADS * gate.width(KEYS // HEADS, VALUES // HEADS), HIDDEN)
            assert linear.weight.dtype == torch.bfloat16
    for name, shape in update.parameter_shapes(KEYS // HEADS).items():
        assert getattr(layer, name).shape == (HEADS, *shape) and getattr(layer, name).dtype == torch.float32


def test_parameter_names_of_softmax_layers():
    attn = [{"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": True}]
    names = {n: tuple(v.shape) for n, v in tiny_model(attn=attn).state_dict().items() if "layers.1.attn." in n}
    expected = {f"{x}_proj.weight": (s, HIDDEN) for x, s in (("q", 32), ("k", 16), ("v", 16), ("o", 32))}
    expected |= {f"{x}_proj.bias": (s,) for x, s in (("q", 32), ("k", 16), ("v", 16))}
    assert names == {f"model.layers.1.attn.{name}": shape for name, shape in expected.items()}


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"hidden_size": 1024, "hidden_ratio": 4}, 2816),
        ({"hidden_size": 2048, "hidden_ratio": None}, 5632),
        ({"hidden_size": 96, "hidden_ratio": 3}, 256),
        ({"intermediate_size": 2048}, 2048),
    ],
)
def test_width_of_the_mlp(changes, width):
    assert MomConfig(**changes).mlp_size == width


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_output_gate": False}, "use_output_gate=False is not supported"),
        ({"use_short_conv": False}, "use_short_conv=False is not supported"),
        ({"mom_backend": "titans"}, "unknown memory rule 'titans': choose one of .*gated_deltanet"),
        ({"hidden_act": "powlu"}, "hidden_act must be one of swish, silu, got 'powlu'"),
        ({"attnres_block_size": 4}, "attnres_block_size must be None, got 4"),
        ({"topk": 5}, "topk must be between 1 and"),
        ({"expand_v": 0.3}, "expand_v"),
        ({"conv_size": 0}, "between 1 and 8, got 0"),
        ({"attn": "flash"}, "must be None, a dictionary"),
        ({"attn": {"layers": [0]}}, "lacks num_heads"),
        ({"attn": {"layers": [0], "num_heads": 2, "sinks": True}}, "not supported: sinks; known are"),
        ({"attn": {"layers": [0], "num_heads": 2, "head_dim": 7}}, "head_dim must be even, got 7"),
        ({"attn": {"layers": [0], "num_heads": 2, "rope_scaling": {"rope_type": "ntk"}}}, "llama3 or yarn, got 'ntk'"),
        ({"attn": {"layers": [0], "num_heads": 2, "kv_lora_rank": 8}}, "attn lacks qk_nope_head_dim"),
        ({"moe": {"layers": [0]}}, "moe lacks num_experts and num_experts_per_tok and intermediate_size"),
        ({"moe": MOE | {"shared": 1}}, "moe has entries that are not supported: shared; known are layers"),
        ({"moe": MOE | {"layers": [2]}}, r"moe's layers must be a list of numbers from 0 to 1, got \[2\]"),
        ({"moe": MOE | {"num_experts_per_tok": 5}}, "at most num_experts, got 5 of 4"),
        ({"moe": MOE | {"n_group": 3, "topk_group": 1}}, "n_group must divide num_experts, got 3 and 4"),
        ({"moe": MOE | {"n_group": 2}}, "give both or neither"),
        ({"moe": MOE | {"score_function": "relu"}}, "one of softmax, sigmoid, sqrtsoftplus, got 'relu'"),
        ({"moe": MOE | {"expert_bias": True}}, "needs the score_function sigmoid"),
        ({"moe": MOE | {"shared_expert_gate": True}}, "needs a shared_expert_intermediate_size"),
        ({"attn": {"layers": [2], "num_heads": 2}}, r"from 0 to 1, got \[2\]"),
        ({"attn": {"layers": [0], "num_heads": 3}}, "must divide hidden_size"),
        ({"attn": {"layers": [0], "num_heads": 4, "num_kv_heads": 3}}, "must divide num_heads, got 3 and 4"),
        ({"attn": {"layers": [0], "num_heads": 2, "window_size": 0}}, "window_size must be a positive"),
        ({"attn": {"layers": [0], "num_heads": 2, "rope_theta": -1}}, "rope_theta must be a positive number, got -1"),
        ({"attn": {"layers": [0], "num_heads": 2, "qkv_bias": 1}}, "qkv_bias must be true or false, got 1"),
        ({"attn": [{"layers": [0], "num_heads": 2}] * 2}, r"names layers twice: \[0\]"),
    ],
)
def test_values_that_no_layer_computes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_old_configurations_load():
    """Configurations without the newer keys, and with keys that no longer exist."""
    old = {
        key: value
        for key, value in tiny_config().to_dict().items()
        if key not in ("single_kv_proj", "mom_backend", "attnres_block_size", "use_layer_wise_balance", "shared_mem")
    }
    config = MomConfig.from_dict(old | {"norm_first": False, "fuse_linear_cross_entropy": False})
    assert config.mom_backend == "gated_deltanet" and config.shared_mem
    MomForCausalLM(config)
