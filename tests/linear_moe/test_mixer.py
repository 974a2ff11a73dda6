"""Megatron's token mixer and router, in one process."""

from functools import partial

import pytest
import torch

from linear_moe.config import MomTransformerConfig
from mom_layers import LinearAttentionLayer, MixtureOfMemories, rule_names

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# On a GPU Transformer Engine multiplies float32 in TF32.
EXACT = DEVICE == "cpu"
CLOSE = {"rtol": 1e-5, "atol": 1e-6} if EXACT else {"rtol": 2e-2, "atol": 2e-3}
CLOSE_GRADIENT = {"rtol": 1e-4, "atol": 1e-5} if EXACT else {"rtol": 2e-2, "atol": 2e-3}
CLOSE_SMALL = {"rtol": 1e-4, "atol": 1e-7} if EXACT else {"rtol": 2e-2, "atol": 5e-6}


EVERY_RULE = pytest.mark.parametrize("rule", ["gated_deltanet", "gla", "kda", "gated_deltanet2"])


def make_config(**settings) -> MomTransformerConfig:
    return MomTransformerConfig(
        **(
            {
                "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "token_mixer": "mom", "mom_num_heads": 2,
                "mom_head_dim": 16, "use_cpu_initialization": True, "normalization": "RMSNorm", "init_method_std": 0.2,
                "gradient_accumulation_fusion": False, "transformer_impl": "local", "layernorm_epsilon": 1e-6,
            }
            | settings
        )
    )  # fmt: skip


def make_mixer(**settings):
    from megatron.core.transformer.spec_utils import build_module

    from linear_moe.layer.decoder_layers import mom_block_spec

    config = make_config(**settings)
    spec = mom_block_spec(config).layer_specs[0].submodules.self_attention
    return build_module(spec, config=config, layer_number=1).to(DEVICE)


def plain_layer(mixer) -> MixtureOfMemories:
    """The same layer without Megatron."""
    c = mixer.config
    plain = MixtureOfMemories(
        c.hidden_size, c.mom_num_heads, c.mom_head_dim, c.mom_expand_v, c.mom_num_memories, c.mom_topk,
        c.mom_shared_memory, c.mom_conv_kernel, c.mom_rule, c.mom_single_kv_proj, c.layernorm_epsilon,
        text_conv=c.mom_text_conv,
    )  # fmt: skip
    q, gate = mixer.in_proj.weight.split([mixer.key_width, mixer.value_width])
    state = {"q_proj.weight": q, "gate_proj.weight": gate, "out_proj.weight": mixer.out_proj.weight}
    state |= {"router.weight": mixer.router.weight, "memory_proj": mixer.memory_proj, "norm_weight": mixer.norm_weight}
    state |= {name: getattr(mixer, name) for name in ("q_conv", "k_conv", "v_conv")}
    state |= {"text_conv": mixer.text_conv} if c.mom_text_conv else {}
    state |= {f"rule_parameters.{name}": getattr(mixer, name) for name in mixer.rule.parameter_names}
    plain.load_state_dict({name: value.detach() for name, value in state.items()})
    return plain.to(DEVICE)


def hidden_states(length=20, batch=3):
    return torch.randn(length, batch, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE).requires_grad_()


@pytest.mark.parametrize(
    "settings",
    [
        *({}, {"mom_shared_memory": False}, {"mom_single_kv_proj": True}, {"mom_topk": 1}, {"mom_rule": "gla"}),
        {"mom_text_conv": 4},
    ],
)
def test_equals_the_plain_layer(megatron, settings):
    mixer = make_mixer(**settings, mom_aux_loss_coeff=0.0)
    plain = plain_layer(mixer)
    x = hidden_states()
    got, bias = mixer(x)
    expected, _ = plain(x.transpose(0, 1))
    assert bias is None
    torch.testing.assert_close(got.transpose(0, 1), expected, **CLOSE)
    grad = torch.randn_like(got)
    (got_grad,) = torch.autograd.grad(got, x, grad)
    (expected_grad,) = torch.autograd.grad(expected, x, grad.transpose(0, 1))
    torch.testing.assert_close(got_grad, expected_grad, **CLOSE_GRADIENT)


@pytest.mark.parametrize("conv_kernel", [4, 1])
@pytest.mark.parametrize("rule", rule_names())
def test_a_rule_alone_equals_the_plain_layer(megatron, rule, conv_kernel):
    mixer = make_mixer(token_mixer=rule, mom_conv_kernel=conv_kernel)
    c = mixer.config
    plain = LinearAttentionLayer(
        c.hidden_size, rule, num_heads=c.mom_num_heads, head_dim=c.mom_head_dim, conv_kernel=conv_kernel,
        norm_eps=c.layernorm_epsilon,
    )  # fmt: skip
    plain.load_state_dict(
        {name: mixer.state_dict()[name.removeprefix("rule_parameters.")] for name in plain.state_dict()}
    )
    plain.to(DEVICE)
    for batch in (1, 3):
        x = hidden_states(batch=batch)
        got, bias = mixer(x)
        expected, _ = plain(x.transpose(0, 1))
        assert bias is None
        torch.testing.assert_close(got.transpose(0, 1), expected, **CLOSE)
        grad = torch.randn_like(got)
        (got_grad,) = torch.autograd.grad(got, x, grad)
        (expected_grad,) = torch.autograd.grad(expected, x, grad.transpose(0, 1))
        torch.testing.assert_close(got_grad, expected_grad, **CLOSE_GRADIENT)


@pytest.mark.parametrize("mixer", [{"mom_rule": "gated_deltanet"}, {"mom_rule": "gla"}, {"token_mixer": "gla"}])
def test_packed_documents_do_not_see_each_other(megatron, mixer):
    from megatron.core.packed_seq_params import PackedSeqParams

    mixer = make_mixer(**mixer).eval()
    x = hidden_states(length=30, batch=1)
    borders = torch.tensor([0, 4, 4, 25], dtype=torch.int32, device=DEVICE)  # five tokens of padding follow
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_kv=borders)
    got, _ = mixer(x, packed_seq_params=packed)
    for first, last in [(0, 4), (4, 25), (25, 30)]:
        torch.testing.assert_close(got[first:last], mixer(x[first:last])[0], rtol=1e-5, atol=1e-6)
    (grad,) = torch.autograd.grad(got[4:25].square().sum(), x)
    assert grad[4:25].abs().sum() > 0 and grad[:4].abs().max() == 0 and grad[25:].abs().max() == 0
    with pytest.raises(ValueError, match="packed documents come as one row of tokens; got a batch of 3"):
        mixer(hidden_states(), packed_seq_params=packed)


def test_refuses_megatron_inference(megatron):
    with pytest.raises(NotImplementedError, match="convert the checkpoint"):
        make_mixer()(hidden_states(), inference_context=object())


@EVERY_RULE
def test_decay_parameters_stay_exact_in_a_bf16_model(megatron, rule):
    mixer = make_mixer(mom_rule=rule)
    exact = {name: getattr(mixer, name).detach().clone() for name in mixer.rule.parameter_names}
    mixer.bfloat16()
    assert mixer.memory_proj.dtype == torch.bfloat16
    assert exact and all(torch.equal(getattr(mixer, name), value) for name, value in exact.items())


@pytest.mark.parametrize("settings", [{}, {"mom_rule": "kda"}, {"token_mixer": "lightning", "mom_conv_kernel": 1}])
def test_parameters_that_were_on_the_meta_device_are_those_of_a_new_layer(megatron, settings):
    """Megatron FSDP gives a module memory by itself, and then calls its `reset_parameters`."""
    torch.manual_seed(0)
    mixer = make_mixer(**settings)

    def marks():
        return {
            name: (
                getattr(p, "tensor_model_parallel", None),
                getattr(p, "partition_dim", None),
                p.requires_grad,
                p.dtype,
            )
            for name, p in mixer.named_parameters(recurse=False)
        }

    marked, fixed = marks(), {name: getattr(mixer, name).clone() for name in mixer.rule.fixed_parameters}
    mixer.to("meta").to_empty(device=DEVICE, recurse=False)
    for _, tensor in [*mixer.named_parameters(recurse=False), *mixer.named_buffers(recurse=False)]:
        tensor.data.fill_(float("nan"))
    mixer.reset_parameters()
    assert marks() == marked
    assert all(p.isfinite().all() for p in mixer.parameters(recurse=False))
    assert all(b.isfinite().all() for b in mixer.buffers(recurse=False))
    assert all(torch.equal(getattr(mixer, name), value) for name, value in fixed.items())


@pytest.mark.parametrize(
    "rule,gates,parameters",
    [
        ("gated_deltanet", {"beta": 2, "a": 2}, {"A_log": (2,), "dt_bias": (2,)}),
        ("gla", {"decay": 32}, {"decay_up": (2, 16, 16), "decay_bias": (2, 16)}),
        ("kda", {"beta": 2, "decay": 32}, {"A_log": (2,), "dt_bias": (2, 16), "decay_up": (2, 16, 16)}),
        ("gated_deltanet2", {"erase": 32, "write": 32, "decay": 32}, {"A_log": (2,), "dt_bias": (2, 16)}),
    ],
)
def test_checkpoint_names_every_fused_piece(megatron, rule, gates, parameters):
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    mixer = make_mixer(mom_rule=rule)
    keys = {}
    for name, entry in mixer.sharded_state_dict("mixer.").items():
        if isinstance(entry, ShardedTensorFactory):
            pieces = entry.build()
            keys |= {piece.key: piece.local_shape for piece in pieces}
            assert torch.equal(entry.merge_fn([piece.data for piece in pieces]), entry.data), name
        elif hasattr(entry, "local_shape"):
            keys[entry.key] = entry.local_shape
    assert keys["mixer.memory_proj.key"] == keys["mixer.memory_proj.value"] == (5, 32, 32)
    assert all(keys[f"mixer.memory_proj.{gate}"] == (5, width, 32) for gate, width in gates.items())
    assert all(keys[f"mixer.{name}"] == shape for name, shape in parameters.items())
    assert keys["mixer.in_proj.weight.query"] == keys["mixer.in_proj.weight.gate"] == (32, 32)
    assert {"mixer.router.weight", "mixer.norm_weight", "mixer.q_conv"} <= keys.keys()


def test_checkpoint_of_a_rule_alone_names_every_piece_and_the_norm(megatron):
    from megatron.core.transformer.spec_utils import build_module

    from linear_moe.layer.decoder_layers import mom_block_spec

    config = make_config(token_mixer="gated_deltanet")
    assert (config.mom_num_memories, config.mom_topk, config.mom_rule) == (0, 0, "gated_deltanet")
    layer = build_module(mom_block_spec(config).layer_specs[0], config=config, layer_number=1)
    entries = layer.sharded_state_dict("").items()
    factory = dict(entries)["self_attention.in_proj.weight"]
    pieces = {piece.key: piece.local_shape for piece in factory.build()}
    prefix = "self_attention.in_proj.weight."
    assert pieces == {
        **dict.fromkeys([prefix + name for name in ("query", "key", "value", "output_gate")], (32, 32)),
        **dict.fromkeys([prefix + name for name in ("beta", "a")], (2, 32)),
    }
    keys = {entry.key for _, entry in entries if hasattr(entry, "key")}
    assert "self_attention.in_proj.layer_norm_weight" in keys and not any("router" in key for key in keys)


@pytest.mark.parametrize("aux,z", [(0.1, None), (0.0, 0.01), (0.1, 0.01)])
def test_router_losses_reach_the_router_with_their_scale(megatron, aux, z):
    """The gradient is that of coefficient * loss, written out, times the scale that the schedule hands over."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from linear_moe.watching.metrics import memory_metrics

    router = make_mixer(mom_aux_loss_coeff=aux, mom_z_loss_coeff=z).router
    x = hidden_states().detach()
    scale = 0.25  # what the schedule gives with four micro-batches
    router.config.experimental_attention_variant_loss_scale_func(torch.tensor(scale))
    try:
        weights, ids = router(x)
        (got,) = torch.autograd.grad(weights, router.weight, torch.zeros_like(weights))
    finally:
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))

    weight = router.weight.detach().clone().requires_grad_()
    logits = (x @ weight.t()).flatten(0, 1)
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(1, ids.flatten(0, 1), 1.0)
    balance = 4 * (chosen.mean(0) / 2 * probabilities.mean(0)).sum()
    loss = aux * balance + (z or 0.0) * logits.logsumexp(-1).square().mean()
    (expected,) = torch.autograd.grad(scale * loss, weight)
    torch.testing.assert_close(got, expected, **CLOSE_SMALL)

    assert not get_moe_metrics_tracker().metrics  # nothing among the losses of a real MoE
    recorded = memory_metrics().losses.metrics
    if aux:
        torch.testing.assert_close(recorded["load_balancing_loss"].values[0], balance.detach(), rtol=1e-4, atol=1e-6)
    memory_metrics().losses.clear()


def test_router_survives_the_expert_bias_of_a_real_moe(megatron):
    """Megatron updates the bias of every module that has one; the memories' router must be left alone."""
    from megatron.core.distributed.finalize_model_grads import (
        _update_router_expert_bias,
        reset_model_temporary_tensors,
    )

    router = make_mixer().router
    config = make_config()
    config.moe_router_enable_expert_bias = True
    reset_model_temporary_tensors(config, [router])
    _update_router_expert_bias([router], config)
    assert router.expert_bias is None


def test_hybrid_spec_keeps_softmax_layers(megatron):
    from megatron.core.transformer.attention import SelfAttention

    from linear_moe.layer.decoder_layers import mom_block_spec
    from linear_moe.layer.mixer import MomTokenMixer

    spec = mom_block_spec(make_config(num_layers=4, linear_attention_freq=[1, 0, 1, 0]))
    mixers = [layer.submodules.self_attention.module for layer in spec.layer_specs]
    assert mixers == [MomTokenMixer, SelfAttention, MomTokenMixer, SelfAttention]


@pytest.mark.parametrize(("setting", "norm"), [("qk_layernorm", "RMSNorm"), ("qk_l2_norm", "L2Norm")])
def test_local_hybrid_layers_have_the_norms_of_queries_and_keys(megatron, setting, norm):
    from megatron.core.transformer.spec_utils import build_module

    from linear_moe.layer.hybrid_specs import hybrid_stack_spec

    for given in (True, False):
        config = make_config(**{setting: given})
        stack = hybrid_stack_spec(config, None).submodules
        layer = build_module(stack.attention_layer, config=config, layer_number=1)
        names = {type(layer.self_attention.q_layernorm).__name__, type(layer.self_attention.k_layernorm).__name__}
        assert names == {norm if given else "NoneType"}


def test_delayed_weight_gradients_are_those_of_the_two_linear_layers(megatron):
    """Transformer Engine's linear layers compute a weight's gradient in backward_dw; local ones have no such method."""
    mixer, x = make_mixer(), hidden_states()
    mixer(x)[0].sum().backward()
    expected = {name: getattr(mixer, name).weight.grad.clone() for name in ("in_proj", "out_proj")}
    mixer.backward_dw()
    assert all(torch.equal(getattr(mixer, name).weight.grad, grad) for name, grad in expected.items())

    for name in expected:  # stand-ins that put their weight's gradient off, as Transformer Engine's layers do
        linear = getattr(mixer, name)
        linear.weight.grad = None
        linear.backward_dw = partial(setattr, linear.weight, "grad", expected[name])
    mixer.backward_dw()
    assert all(getattr(mixer, name).weight.grad is grad for name, grad in expected.items())


def test_a_layer_offers_what_the_overlap_of_experts_exchange_takes_from_attention(megatron):
    from megatron.core.models.common.utils import _BackwardDWWrapper
    from megatron.core.transformer.spec_utils import build_module

    from linear_moe.layer.decoder_layers import mom_block_spec

    config = make_config()
    layer = build_module(mom_block_spec(config).layer_specs[0], config=config, layer_number=1)
    called = []
    layer.self_attention.in_proj.backward_dw = partial(called.append, "in_proj")
    layer.self_attention.out_proj.backward_dw = partial(called.append, "out_proj")
    _BackwardDWWrapper(layer).backward_dw()
    assert called == ["in_proj", "out_proj"]
