"""The values that MomTransformerConfig accepts, and its messages about other values."""

import pytest

from linear_moe.config import MomTransformerConfig


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


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"token_mixer": "mamba"}, "--token-mixer must be one of attention, mom, got 'mamba'"),
        ({"mom_rule": "hebb"}, "unknown memory rule 'hebb': choose one of gated_deltanet, gla"),
        ({"mom_topk": 5}, r"topk must be between 1 and the number of memories \(4\), got 5"),
        ({"mom_topk": 0}, r"topk must be between 1 and the number of memories \(4\), got 0"),
        ({"mom_head_dim": 100}, "head_dim = 100 is not supported by the gated_deltanet kernels: use one of 16, 32, 64"),
        ({"mom_expand_v": 3.0}, r"head_dim \* expand_v = 768 is not supported"),
        ({"mom_num_heads": 3, "tensor_model_parallel_size": 2}, "--mom-num-heads 3 does not divide over"),
        ({"mom_aux_loss_coeff": -1.0}, "--mom-aux-loss-coeff must not be negative, got -1.0"),
        ({"mom_kernels": "cuda"}, "--mom-kernels must be one of auto, torch, triton, got 'cuda'"),
        ({"linear_attention_freq": 1}, "--linear-attention-freq 1 leaves no MoM layer"),
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
            {"cuda_graph_impl": "full_iteration", "expert_model_parallel_size": 2},
            "--cuda-graph-impl full_iteration needs --expert-model-parallel-size 1, got 2",
        ),
        (
            {"context_parallel_size": 4, "expert_model_parallel_size": 2},
            "--expert-model-parallel-size 2 must be 1 or a multiple of --context-parallel-size 4",
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


def test_any_head_size_works_with_the_torch_kernels():
    assert config(mom_head_dim=100, mom_kernels="torch").mom_value_dim == 100
