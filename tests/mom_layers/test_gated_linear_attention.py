"""Chunked gated linear attention in PyTorch against the token-by-token loop, and the rule's own parts."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, relative_error

from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.rules import RuleInputs, get_rule, gla
from mom_layers.recur.rules.gla import gated_linear_attention_reference

RAGGED = [0, 1, 2, 63, 64, 65, 0, 75, 200]
NAMES = ("q", "k", "v", "g", "initial_state")
DECAYS = ("usual", "zero", "strong", "resets", "extreme")


def inputs(lengths, heads=2, key_size=16, value_size=32, dtype=torch.float64, decay="usual"):
    """Leaves by name, g in float32 at least, and cu_seqlens."""
    torch.manual_seed(sum(lengths) + key_size)
    rows = sum(lengths)
    q, k, g = (torch.randn(rows, heads, key_size) for _ in range(3))
    usual, strong = -0.1 * torch.rand(g.shape), -20 - torch.rand(g.shape)
    resets = torch.where(torch.rand(g.shape) < 0.5, strong, usual)
    # Up to -300, with the smallest number of float32 here and there, as a caller may write for "forget everything".
    extreme = torch.where(torch.rand(g.shape) < 0.1, torch.finfo(g.dtype).min, -300 * torch.rand(g.shape) ** 4)
    g = {"usual": usual, "zero": 0 * g, "strong": strong, "resets": resets, "extreme": extreme}[decay]
    v, state = torch.randn(rows, heads, value_size), torch.randn(len(lengths), heads, key_size, value_size)
    exact = torch.promote_types(dtype, torch.float32)
    types = (dtype, dtype, dtype, exact, exact)
    tensors = zip(NAMES, (q, k, v, g, 0.3 * state), types, strict=True)
    leaves = {name: x.to(DEVICE, kind).requires_grad_() for name, x, kind in tensors}
    return leaves, torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def outputs_and_gradients(function, leaves, cu_seqlens, state=True, final=True):
    """function(q, k, v, g, cu_seqlens, initial state or None) -> o, final state; gradients of a weighting of both."""
    o, last = function(*(leaves[n] for n in NAMES[:4]), cu_seqlens, leaves["initial_state"] if state else None)
    torch.manual_seed(7)
    do, d_last = torch.randn(leaves["v"].shape), 0.3 * torch.randn(leaves["initial_state"].shape)
    loss = (o.double().cpu() * do.to(leaves["v"].dtype).double()).sum()
    loss = loss + (last.double().cpu() * d_last.double()).sum() if final else loss
    wanted = {n: leaf for n, leaf in leaves.items() if state or n != "initial_state"}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    got = {"o": o} | ({"final_state": last} if final else {})
    return got | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def expected(leaves, cu_seqlens, state=True, final=True, scale=None):
    double = {n: leaf.detach().double().cpu().requires_grad_() for n, leaf in leaves.items()}

    def reference(q, k, v, g, cu_seqlens, initial_state):
        return gated_linear_attention_reference(q, k, v, g, cu_seqlens.cpu(), initial_state, scale)

    return outputs_and_gradients(reference, double, cu_seqlens, state, final)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gated_linear_attention_agrees(dtype, decay):
    leaves, cu_seqlens = inputs(RAGGED, dtype=dtype, decay=decay)

    def chunked(q, k, v, g, cu_seqlens, state):
        return gated_linear_attention(
            q, k, v, g, cu_seqlens, initial_state=state, output_final_state=True, kernels="torch"
        )

    got, want = outputs_and_gradients(chunked, leaves, cu_seqlens), expected(leaves, cu_seqlens)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items())


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 0, 5], [17], [0, 0]])
def test_gated_linear_attention_agrees_for_short_segments(lengths):
    leaves, cu_seqlens = inputs(lengths)

    def chunked(q, k, v, g, cu_seqlens, state):
        return gated_linear_attention(
            q, k, v, g, cu_seqlens, initial_state=state, output_final_state=True, scale=0.7, kernels="torch"
        )

    got, want = outputs_and_gradients(chunked, leaves, cu_seqlens), expected(leaves, cu_seqlens, scale=0.7)
    assert all(relative_error(got[name], want[name]) <= 1e-10 for name in want)


@pytest.mark.parametrize("decay", DECAYS)
def test_transition_is_what_a_segment_leaves_of_its_state(decay):
    """Without keys the final state is the transition times the initial one, channel by channel; its gradient too."""
    leaves, cu_seqlens = inputs(RAGGED, dtype=torch.float64, decay=decay)
    q, k, v, g, state = leaves.values()
    got = gla.transition(RuleInputs(q, k, v, {"g": g}), cu_seqlens, "auto")
    _, last = gated_linear_attention_reference(q, 0 * k, v, g, cu_seqlens, state)
    assert got.shape == state.shape[:3] and got.dtype == torch.float64
    assert relative_error(got[..., None] * state, last) <= 1e-12
    (mine,) = torch.autograd.grad((got[..., None] * state).sum(), g)
    (theirs,) = torch.autograd.grad(last.sum(), g)
    assert relative_error(mine, theirs) <= 1e-12
    assert gla.transition(RuleInputs(q, k.bfloat16(), v, {"g": g}), cu_seqlens, "auto").dtype == torch.float32


def test_gla_gate():
    """Between -1/16 of the logit and 0, a head from its own 16 numbers only."""
    rule = get_rule("gla")
    parameters = rule.init_parameters(3, 32)
    assert {name: (3, *shape) for name, shape in rule.parameter_shapes(32).items()} == {
        name: tuple(value.shape) for name, value in parameters.items()
    }
    raw = torch.randn(5, 3 * gla.RANK, requires_grad=True)
    g = gla.gates({"decay": raw}, parameters)["g"]
    assert g.shape == (5, 3, 32) and (g < 0).all()
    by_hand = torch.sigmoid(raw[2, 16:32] @ parameters["decay_up"][1]) ** (1 / 16)
    torch.testing.assert_close(g[2, 1].exp(), by_hand)
    (grad,) = torch.autograd.grad(g[:, 1].sum(), raw)
    assert grad[:, 16:32].abs().min() > 0 and not grad[:, :16].any() and not grad[:, 32:].any()
    assert gla.gates({"decay": raw.bfloat16()}, parameters)["g"].dtype == torch.float32


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": (8, 2, 15)}, r"q and k must be \[R, H, K\].*\[8, 2, 15\]"),
        ({"g": (8, 2)}, r"g must be \[8, 2, 16\] as q is, got \[8, 2\]"),
        ({"initial_state": (1, 2, 16, 32)}, r"initial_state must be \[2, 2, 16, 32\], got \[1, 2, 16, 32\]"),
    ],
)
def test_gated_linear_attention_refuses(change, message):
    leaves, cu_seqlens = inputs([5, 3])
    leaves |= {name: torch.zeros(shape, device=cu_seqlens.device) for name, shape in change.items()}
    q, k, v, g, state = leaves.values()
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(q, k, v, g, cu_seqlens, initial_state=state)
