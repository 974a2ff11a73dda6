"""Operations of a model against counts by hand."""

from types import SimpleNamespace

import pytest
import torch
from megatron.training import training
from torch.utils.flop_counter import FlopCounterMode

from linear_moe.watching.flops import FLOPS_TARGET, mom_layer_flops, peak_flops
from megatron_patches.patch import Patch
from mom_layers.layer import LinearAttentionLayer, MixtureOfMemories
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules import rule_names
from mom_layers.settings import ONE_MEMORY

BATCH, LENGTH = 2, 2048
TOKENS = BATCH * LENGTH

# The paper's 380M model, for one token, forward: 4 heads of 256, 4 memories, 2 of them and the shared one a token.
ROUTER = 2 * 1024 * 4
QUERY_GATE_OUT = 2 * 1024 * (1024 + 1024 + 1024)
MEMORY_PROJECTIONS = 3 * 2 * 1024 * (1024 + 1024 + 4 + 4)
CONVOLUTIONS = 3 * 2 * 4 * (1024 + 1024 + 1024)
RECURRENCE = 3 * 4 * (4 * CHUNK * 256 + CHUNK * (256 + 256) + 2 * CHUNK * 256 + 6 * 256 * 256)
MOM_LAYER = ROUTER + QUERY_GATE_OUT + MEMORY_PROJECTIONS + CONVOLUTIONS + RECURRENCE
MLP_LAYER = 2 * 3 * 1024 * 2048
LOGITS = 2 * 1024 * 32000
ATTENTION_LAYER = 2 * 4 * 1024 * 1024 + 2 * LENGTH * 1024  # projections; scores and values under a causal mask


@pytest.fixture(autouse=True)
def patched():
    patch = Patch(name="flops", reason="to test", removed_when="never", targets=(FLOPS_TARGET,))
    patch.apply()
    yield
    patch.undo()


def recipe(**changes):
    """The arguments of the 380M model that Megatron's num_floating_point_operations reads."""
    args = dict(
        num_layers=24, hidden_size=1024, ffn_hidden_size=2048, swiglu=True, seq_length=LENGTH, padded_vocab_size=32000,
        num_attention_heads=4, kv_channels=256, group_query_attention=False, num_query_groups=None,
        attention_output_gate=False, multi_latent_attention=False, experimental_attention_variant=None,
        linear_attention_freq=None, hybrid_layer_pattern=None, mtp_num_layers=None, num_experts=None,
        moe_layer_freq=1, moe_router_topk=2, moe_ffn_hidden_size=None, moe_latent_size=None,
        moe_shared_expert_intermediate_size=None,
        mamba_state_dim=128, mamba_head_dim=64, mamba_num_groups=8, mamba_num_heads=None,
        linear_key_head_dim=None, linear_value_head_dim=None, linear_num_key_heads=None, linear_num_value_heads=None,
        linear_conv_kernel_dim=None,
        token_mixer="mom", mom_rule="gated_deltanet", mom_num_memories=4, mom_topk=2, mom_shared_memory=True,
        mom_num_heads=4, mom_head_dim=256, mom_expand_v=1.0, mom_conv_kernel=4, mom_single_kv_proj=False,
        mom_text_conv=0,
    )  # fmt: skip
    return SimpleNamespace(**(args | changes))


def count(args, **lengths):
    return training.num_floating_point_operations(args, BATCH, **lengths)


def test_mom_layer_flops_by_hand():
    assert mom_layer_flops(recipe(), TOKENS) == 3 * TOKENS * MOM_LAYER
    single = mom_layer_flops(recipe(mom_single_kv_proj=True, mom_shared_memory=False), TOKENS)
    rows = 2 * (CONVOLUTIONS + RECURRENCE) // 3
    assert single == 3 * TOKENS * (ROUTER + QUERY_GATE_OUT + MEMORY_PROJECTIONS // 3 + rows)
    over_text = mom_layer_flops(recipe(mom_text_conv=4), TOKENS) - mom_layer_flops(recipe(), TOKENS)
    assert over_text == 3 * TOKENS * 2 * 4 * 1024


@pytest.mark.parametrize("rule", rule_names())
def test_flops_of_a_rule_alone_against_a_flop_counter(rule):
    sizes = {"num_heads": 2, "head_dim": 16, "expand_v": 2.0}
    layer = LinearAttentionLayer(64, rule, **sizes, kernels="torch")
    args = SimpleNamespace(hidden_size=64, mom_conv_kernel=4, token_mixer=rule, mom_rule=rule,
                           **{f"mom_{name}": value for name, value in (sizes | ONE_MEMORY).items()})  # fmt: skip
    weights = layer.in_proj.weight.numel() + layer.out_proj.weight.numel()
    keys, values = layer.q_conv.shape[0], layer.v_conv.shape[0]
    rest = 2 * 48 * 4 * (2 * keys + values) + layer.rule.recurrence_flops(48, 2, 16, 32)
    assert mom_layer_flops(args, 48) == 3 * (2 * 48 * weights + rest)


@pytest.mark.parametrize("rule", ["gated_deltanet", "gla"])
@pytest.mark.parametrize("single_kv_proj", [False, True])
def test_mom_layer_flops_against_a_flop_counter(single_kv_proj, rule):
    sizes = dict(
        rule=rule, num_heads=2, head_dim=16, expand_v=2.0, num_memories=4, topk=2, single_kv_proj=single_kv_proj
    )
    layer = MixtureOfMemories(64, **sizes, kernels="torch")
    x = torch.randn(2, 24, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layer(x)[0].sum().backward()
    projections = counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    args = SimpleNamespace(
        hidden_size=64, mom_shared_memory=True, mom_conv_kernel=4, mom_text_conv=0,
        **{f"mom_{name}": value for name, value in sizes.items()},
    )  # fmt: skip
    rows, keys, values = 3 * 48, 32, 64
    convolutions = 2 * rows * 4 * (2 * keys + values)
    recurrence = layer.rule.recurrence_flops(rows, 2, 16, 32)
    assert projections == mom_layer_flops(args, 48) - 3 * (convolutions + recurrence)


def test_model_of_one_memory_a_layer():
    alone = {f"mom_{name}": value for name, value in ONE_MEMORY.items()}
    layer = QUERY_GATE_OUT + (MEMORY_PROJECTIONS + CONVOLUTIONS + RECURRENCE) // 3
    args = recipe(token_mixer="gated_deltanet", **alone)
    assert count(args) == pytest.approx(3 * TOKENS * (24 * (layer + MLP_LAYER) + LOGITS), rel=1e-12)


def test_model_of_mom_layers():
    args = recipe()
    before = dict(vars(args))
    assert count(args) == pytest.approx(3 * TOKENS * (24 * (MOM_LAYER + MLP_LAYER) + LOGITS), rel=1e-12)
    # The one argument that Megatron sets while counting softmax layers.
    assert vars(args) == before | {"num_query_groups": 4}
    softmax = recipe(token_mixer="attention")
    count(softmax)
    assert softmax.num_query_groups == args.num_query_groups


@pytest.mark.parametrize("freq, num_mom", [(4, 18), ([1] * 5 + [0] * 19, 5)])
def test_model_of_both_mixers(freq, num_mom):
    mixers = num_mom * MOM_LAYER + (24 - num_mom) * ATTENTION_LAYER
    expected = 3 * TOKENS * (mixers + 24 * MLP_LAYER + LOGITS)
    assert count(recipe(linear_attention_freq=freq)) == pytest.approx(expected, rel=1e-12)


def test_softmax_attention_is_counted_by_megatron():
    args = recipe(token_mixer="attention")
    assert count(args) == pytest.approx(3 * TOKENS * (24 * (ATTENTION_LAYER + MLP_LAYER) + LOGITS), rel=1e-12)
    del args.token_mixer
    assert count(args) == training.num_floating_point_operations.__wrapped__(args, BATCH)


def test_experts_and_multi_token_prediction():
    args = recipe(num_experts=8, moe_ffn_hidden_size=512, mtp_num_layers=1, linear_attention_freq=[0] * 23 + [1])
    softmax = count(recipe(token_mixer="attention", num_experts=8, moe_ffn_hidden_size=512, mtp_num_layers=1))
    # The predicting layer is Megatron's own.
    assert count(args) == pytest.approx(softmax + 3 * TOKENS * (MOM_LAYER - ATTENTION_LAYER), rel=1e-12)


def test_hybrid_model_counts_its_memory_layers():
    args = recipe(hybrid_layer_pattern="R-|*-R-", num_layers=6, num_query_groups=4)
    expected = 2 * MOM_LAYER + ATTENTION_LAYER + 3 * MLP_LAYER + LOGITS
    assert count(args) == pytest.approx(3 * TOKENS * expected, rel=1e-12)


def test_padding_is_not_counted():
    args = recipe(linear_attention_freq=[0] + [1] * 23)
    lengths = [1000, 500]
    counted = count(args, seqlen_squared_sum_in_batch=1000**2 + 500**2, total_real_tokens_in_batch=sum(lengths))
    linear = 1500 * (23 * MOM_LAYER + 2 * 4 * 1024 * 1024 + 24 * MLP_LAYER + LOGITS)
    assert counted == pytest.approx(3 * (linear + 2 * (1000**2 + 500**2) * 1024), rel=1e-12)


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10G", None),
        ("cpu", None),
    ],
)
def test_peak_flops(name, peak):
    assert peak_flops(name) == peak
