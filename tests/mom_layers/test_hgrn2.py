"""HGRN2's decay and keys."""

import torch
from comparison import relative_error

from mom_layers import MixtureOfMemories
from mom_layers.recur.rules import get_rule, hgrn2

HEADS, K = 3, 16


def parameters_of_bounds(bounds):
    """The layer's parameter for lower bounds c."""
    return {"lower_bound": (bounds / (1 - bounds)).sqrt()}


def test_the_decay_follows_the_table_of_a_whole_model():
    """f = c + (1 - c) sigmoid(x), with c of layer l the sum of P_1 ... P_l, P the softmax of a table over layers."""
    torch.manual_seed(0)
    shares = torch.randn(4, HEADS, K, dtype=torch.float64).softmax(0)
    raw = 5 * torch.randn(7, HEADS * K, dtype=torch.float64)
    v = torch.randn(7, HEADS, 8, dtype=torch.float64)
    for layer in range(4):
        bound = shares[1 : layer + 1].sum(0)
        f = bound + (1 - bound) * torch.sigmoid(raw.view(7, HEADS, K))
        inputs = hgrn2.prepare(v, v, v, {"forget": raw}, parameters_of_bounds(bound), "torch")
        assert relative_error(inputs.gates["g"].exp(), f) <= 1e-12
        assert relative_error(inputs.k, 1 - f) <= 1e-12


def test_layers_start_with_bounds_that_grow():
    for layer in range(4):
        p = get_rule("hgrn2").parameters_of_layer(HEADS, K, layer, 4)["lower_bound"]
        torch.testing.assert_close(p**2 / (1 + p**2), torch.full((HEADS, K), layer / 4))


def test_keys_of_a_decay_close_to_one_keep_their_digits():
    """1 - exp(g) is 12 % off in bfloat16, and zero in float32 from logits of 17 on."""
    raw = torch.linspace(2, 30, HEADS * K).expand(2, -1)
    exact = torch.sigmoid(-raw.double().view(2, HEADS, K))
    zero = {"lower_bound": torch.zeros(HEADS, K)}
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2**-8)):
        q = torch.zeros(2, HEADS, K, dtype=dtype)
        k = hgrn2.prepare(q, q, q, {"forget": raw}, zero, "torch").k
        assert k.dtype == dtype and ((k.double() - exact).abs() / exact).max() <= tolerance


def test_gradients_are_finite_without_a_bound_and_at_extreme_logits():
    rule = get_rule("hgrn2")
    parameters = {name: p.requires_grad_() for name, p in rule.init_parameters(HEADS, K).items()}
    raw = torch.tensor([-200.0, -1.0, 0.0, 200.0]).repeat(1, HEADS * K // 4).requires_grad_()
    q = torch.zeros(1, HEADS, K)
    inputs = rule.prepare(q, q, q, {"forget": raw}, parameters, "torch")
    (inputs.k.sum() + inputs.gates["g"].clamp(min=-80).sum()).backward()
    assert torch.isfinite(raw.grad).all() and raw.grad.any()
    assert not parameters["lower_bound"].grad.any()  # no bound stays no bound


def test_every_parameter_of_a_layer_gets_a_gradient():
    """Those of the keys, which hgrn2 does not read, a gradient of zero."""
    torch.manual_seed(0)
    for single in (False, True):
        layer = MixtureOfMemories(24, num_heads=2, head_dim=16, rule="hgrn2", single_kv_proj=single, kernels="torch")
        layer(torch.randn(1, 9, 24))[0].square().sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is None] == []
        assert not layer.k_conv.grad.any() and layer.v_conv.grad.any()
