"""The values that MomTransformerConfig accepts, and its messages about other values."""

from argparse import Namespace

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig

from linear_moe.config import LOSS_SCALE_HOOK, MomTransformerConfig, configure, describe_memories, splits_memories
from linear_moe.layer.decoder_layers import mom_block_spec
from mom_layers.recur.rules import RawGate, registry, rule_from_equation, rule_names


def config(**settings) -> MomTransformerConfig:
    return MomTransformerConfig(
        **({"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "token_mixer": "mom"} | settings)
    )


@pytest.mark.parametrize(
    "freq,pattern",
    [(None, "1111"), (2, "1010"), (4, "1110"), ([0, 1, 1, 0], "0110")],
)
def test_which_layers_are_mom(freq, pattern):
    assert config(linear_attention_freq=freq).mom_layer_pattern() == [c == "1" for c in pattern]


def test_attention_has_no_mom_layer():
    assert not any(config(token_mixer="attention").mom_layer_pattern())


def test_a_model_without_experts_has_the_hook_that_scales_the_losses():
    assert config().experimental_attention_variant_loss_scale_func is not None
    assert config(token_mixer="attention").experimental_attention_variant_loss_scale_func is None


SPLIT = {"expert_model_parallel_size": 2, "mom_expert_parallel": "on"}


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"token_mixer": "mamba"}, "--token-mixer must be one of attention, mom, .*gla.*, got 'mamba'"),
        ({"mom_rule": "hebb"}, "unknown memory rule 'hebb': choose one of " + ", ".join(rule_names())),
        ({"mom_topk": 5}, r"topk must be between 1 and the number of memories \(4\), got 5"),
        ({"mom_topk": 0}, r"topk must be between 1 and the number of memories \(4\), got 0"),
        ({"mom_head_dim": 100}, "head_dim = 100 is not supported by the gated_deltanet kernels: use one of 16, 32, 64"),
        ({"mom_expand_v": 3.0}, r"head_dim \* expand_v = 768 is not supported"),
        ({"mom_num_heads": 3, "tensor_model_parallel_size": 2}, "--mom-num-heads 3 does not divide over"),
        ({"mom_aux_loss_coeff": -1.0}, "--mom-aux-loss-coeff must be a number that is not negative, got -1.0"),
        ({"mom_expert_parallel": "yes"}, "--mom-expert-parallel must be one of auto, on, off, got 'yes'"),
        (
            {"mom_expert_exchange": "mail"},
            "--mom-expert-exchange must be one of auto, all-to-all, all-gather, peer-memory, got 'mail'",
        ),
        ({"mom_loss_chunk": -1}, "--mom-loss-chunk must be a number of tokens below 2147483648, or 0 for all, got -1"),
        ({"mom_loss_chunk": 2**40}, "--mom-loss-chunk must be a number of tokens below 2147483648"),
        ({"mom_kernels": "cuda"}, "--mom-kernels must be one of auto, torch, triton, got 'cuda'"),
        ({"linear_attention_freq": 1}, "--linear-attention-freq 1 leaves no MoM layer"),
        ({"linear_attention_freq": 0}, "--linear-attention-freq 0 leaves no MoM layer"),
        ({"linear_attention_freq": [0, 0, 0, 0]}, "lists no MoM layer"),
        ({"linear_attention_freq": [1, 1]}, "a 0 or 1 for each of the 4 layers, got .1, 1."),
        (
            {"context_parallel_size": 2, "transformer_impl": "local", "linear_attention_freq": 2},
            "softmax attention layers need --transformer-impl transformer_engine with --context-parallel-size 2",
        ),
        (
            {"context_parallel_size": 2, "transformer_impl": "local", "mtp_num_layers": 1},
            "make every layer MoM .no --linear-attention-freq, no --mtp-num-layers",
        ),
        (
            {"cuda_graph_impl": "full_iteration", **SPLIT},
            "--cuda-graph-impl full_iteration lets no layer wait for the host",
        ),
        (
            {"context_parallel_size": 4, **SPLIT},
            "--expert-model-parallel-size 2 is no multiple of --context-parallel-size 4",
        ),
        ({"mom_num_memories": 0, "mom_topk": 0}, "--token-mixer gated_deltanet trains one memory alone"),
        (
            {"token_mixer": "gated_deltanet", "mom_rule": "gla"},
            "--mom-rule gla: --token-mixer gated_deltanet is one",
        ),
        ({"token_mixer": "gla", "mom_num_memories": 8}, "--mom-num-memories 8: --token-mixer gla is one memory"),
        ({"token_mixer": "gla", "mom_single_kv_proj": True}, "--mom-single-kv-proj True: --token-mixer gla is one"),
        ({"token_mixer": "gla", "mom_head_dim": 100}, "head_dim = 100 is not supported by the gla kernels: use one of"),
        (
            {"token_mixer": "gla", "mom_expert_parallel": "on"},
            "--mom-expert-parallel on: --token-mixer gla has one memory: leave out --mom-expert-parallel",
        ),
        (
            {"token_mixer": "gla", "mom_num_heads": 3, "tensor_model_parallel_size": 2},
            "--mom-num-heads 3 does not divide over --tensor-model-parallel-size 2",
        ),
        (
            {"token_mixer": "gla", "context_parallel_size": 2, "hybrid_context_parallel": True},
            "--token-mixer gla does not work with --hybrid-context-parallel: use --context-parallel-size alone",
        ),
        (
            {"context_parallel_size": 2, "hybrid_context_parallel": True},
            "does not work with --hybrid-context-parallel: use --context-parallel-size alone",
        ),
    ],
)
def test_refused_values_and_combinations(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@pytest.mark.parametrize("rule", rule_names())
def test_a_rule_alone_has_one_memory_and_no_router(megatron, rule):
    found = config(token_mixer=rule, transformer_impl="local", mom_head_dim=16)
    settings = found.mixer_settings()
    assert settings.alone and settings.rule == rule and found.mom_layer_pattern() == [True] * found.num_layers
    assert getattr(found, LOSS_SCALE_HOOK, None) is None  # there is no router loss to scale
    mixers = {layer.submodules.self_attention.module.__name__ for layer in mom_block_spec(found).layer_specs}
    assert mixers == {"OneMemoryTokenMixer"}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rule_of_ones_own_that_slices_of_a_sequence_cannot_pass_on(ranks, monkeypatch):
    def step(state, k, v, gates):
        return gates["f"].sigmoid()[:, :, None] * state + k[..., None] * v[..., None, :]

    rule = rule_from_equation("columns", step, raw_gates=(RawGate("f", "value", "f"),))
    monkeypatch.setitem(registry._RULES, rule.name, rule)
    settings = {"transformer_impl": "local", "mom_head_dim": 16, "context_parallel_size": ranks}
    for names in ({"mom_rule": rule.name}, {"token_mixer": rule.name}):
        if ranks == 4:
            with pytest.raises(ValueError, match="--context-parallel-size must be 1 or 2, got 4"):
                config(**settings, **names)
        else:
            assert config(**settings, **names).mixer_settings().rule == rule.name


def test_any_head_size_works_with_the_torch_kernels():
    assert config(mom_head_dim=100, mom_kernels="torch").mom_value_dim == 100


EXPERTS = {"num_moe_experts": 8, "expert_model_parallel_size": 8, "moe_ffn_hidden_size": 64, "add_bias_linear": False}


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"mom_num_memories": 16},
            "memories: 2 of 16 on each of 8 expert-parallel ranks, which exchange tokens by all-to-all",
        ),
        (
            {},
            "memories: all 4 on each of 8 expert-parallel ranks, because --mom-num-memories 4 does not divide over "
            "--expert-model-parallel-size 8",
        ),
        (
            {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
            "memories: all 4 on each of 2 expert-parallel ranks, because --tensor-model-parallel-size 2 splits each "
            "memory by head, and --expert-tensor-parallel-size 1 is another size",
        ),
        (
            {"expert_model_parallel_size": 2, "context_parallel_size": 4},
            "memories: all 4 on each of 2 expert-parallel ranks, because a memory reads whole sequences, and "
            "--expert-model-parallel-size 2 is no multiple of --context-parallel-size 4",
        ),
        (
            {"expert_model_parallel_size": 2, "use_megatron_fsdp": True},
            "memories: all 4 on each of 2 expert-parallel ranks, because --use-megatron-fsdp shards all parameters but "
            "experts over every data-parallel rank",
        ),
        (
            {"expert_model_parallel_size": 2, "cuda_graph_impl": "full_iteration"},
            "memories: all 4 on each of 2 expert-parallel ranks, because --cuda-graph-impl full_iteration lets no "
            "layer wait for the host, which reads how many rows the ranks exchange (--mom-expert-exchange all-gather "
            "and peer-memory read nothing)",
        ),
        (
            {
                "expert_model_parallel_size": 2,
                "cuda_graph_impl": "full_iteration",
                "mom_expert_exchange": "peer-memory",
            },
            "memories: 2 of 4 on each of 2 expert-parallel ranks, which exchange tokens by peer-memory",
        ),
        (
            {"mom_num_memories": 16, "mom_expert_parallel": "off"},
            "memories: all 16 on each of 8 expert-parallel ranks, because --mom-expert-parallel off",
        ),
        ({"expert_model_parallel_size": 1}, None),
    ],
)
def test_the_start_says_where_the_memories_of_a_model_with_experts_are(settings, line):
    found = config(**(EXPERTS | settings))
    assert describe_memories(found) == line
    assert splits_memories(found) == (line is not None and "because" not in line)


def test_softmax_layers_keep_multi_latent_attention(megatron):
    """Megatron replaces the class of a configuration with multi-latent attention; ours has both kinds of fields."""
    args = Namespace(
        multi_latent_attention=True, num_experts=None, expert_model_parallel_size=2, token_mixer="mom",
        mom_num_memories=8, contiguous_context_slices=True,
    )  # fmt: skip

    def megatrons(args, config_class=None):
        assert args.expert_model_parallel_size == 1
        return MLATransformerConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4, linear_attention_freq=2, q_lora_rank=24,
            rope_type="rope", transformer_impl="local",
        )  # fmt: skip

    found = configure(megatrons, args)
    assert isinstance(found, MomTransformerConfig) and isinstance(found, MLATransformerConfig)
    assert (found.multi_latent_attention, found.q_lora_rank, found.v_head_dim) == (True, 24, 128)
    assert (found.mom_num_memories, found.mom_topk, found.contiguous_context_slices) == (8, 2, True)
    assert found.expert_model_parallel_size == 2 and splits_memories(found)
    mixers = [layer.submodules.self_attention.module.__name__ for layer in mom_block_spec(found).layer_specs]
    assert mixers == ["MomTokenMixer", "MLASelfAttention"] * 2
