"""Chunked scalar decay in PyTorch against the token-by-token loop."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, relative_error

from mom_layers.recur.rules.scalar_decay import plain_loop
from mom_layers.recur.scalar_decay import scalar_decay

RAGGED = [0, 1, 2, 63, 64, 65, 0, 75, 200]
NAMES = ("q", "k", "v", "g", "initial_state")
DECAYS = ("usual", "zero", "strong", "resets", "fixed", "none")


def inputs(lengths, heads=2, key_size=16, value_size=32, dtype=torch.float64, decay="usual"):
    """Leaves by name, g in float32 at least ([H] for "fixed", absent for "none"), and cu_seqlens."""
    torch.manual_seed(sum(lengths) + key_size)
    rows = sum(lengths)
    q, k = torch.randn(rows, heads, key_size), torch.randn(rows, heads, key_size)
    v, state = torch.randn(rows, heads, value_size), torch.randn(len(lengths), heads, key_size, value_size)
    usual, strong = -0.1 * torch.rand(rows, heads), -20 - torch.rand(rows, heads)
    resets = torch.where(torch.rand(rows, heads) < 0.5, strong, usual)
    fixed = -0.1 * torch.arange(1.0, heads + 1)
    g = {"usual": usual, "zero": 0 * usual, "strong": strong, "resets": resets, "fixed": fixed, "none": None}[decay]
    exact = torch.promote_types(dtype, torch.float32)
    tensors = zip(NAMES, (q, k, v, g, 0.3 * state), (dtype, dtype, dtype, exact, exact), strict=True)
    leaves = {name: x.to(DEVICE, kind).requires_grad_() for name, x, kind in tensors if x is not None}
    return leaves, torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def outputs_and_gradients(function, leaves, cu_seqlens, state=True, final=True):
    """function(q, k, v, g, cu_seqlens, initial state or None) -> o, final state; gradients of a weighting of both."""
    q, k, v = (leaves[name] for name in NAMES[:3])
    o, last = function(q, k, v, leaves.get("g"), cu_seqlens, leaves["initial_state"] if state else None)
    torch.manual_seed(7)
    do, d_last = torch.randn(v.shape), 0.3 * torch.randn(leaves["initial_state"].shape)
    loss = (o.double().cpu() * do.to(v.dtype).double()).sum()
    loss = loss + (last.double().cpu() * d_last.double()).sum() if final else loss
    wanted = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad and (state or n != "initial_state")}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)
    got = {"o": o} | ({"final_state": last} if final else {})
    return got | {f"d{name}": grad for name, grad in zip(wanted, grads, strict=True)}


def expected(leaves, cu_seqlens, state=True, final=True, scale=None):
    double = {n: leaf.detach().double().cpu().requires_grad_(leaf.requires_grad) for n, leaf in leaves.items()}

    def reference(q, k, v, g, cu_seqlens, initial_state):
        return plain_loop(q, k, v, g, cu_seqlens.cpu(), initial_state, scale)

    return outputs_and_gradients(reference, double, cu_seqlens, state, final)


def chunked(q, k, v, g, cu_seqlens, initial_state, scale=None):
    return scalar_decay(
        q, k, v, g, cu_seqlens,
        initial_state=initial_state, output_final_state=True, scale=scale, kernels="torch",
    )  # fmt: skip


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scalar_decay_agrees(dtype, decay):
    leaves, cu_seqlens = inputs(RAGGED, dtype=dtype, decay=decay)
    got, want = outputs_and_gradients(chunked, leaves, cu_seqlens), expected(leaves, cu_seqlens)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items())


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 0, 5], [17], [0, 0]])
def test_scalar_decay_agrees_for_short_segments(lengths):
    leaves, cu_seqlens = inputs(lengths)
    got = outputs_and_gradients(lambda *x: chunked(*x, scale=0.7), leaves, cu_seqlens)
    want = expected(leaves, cu_seqlens, scale=0.7)
    assert all(relative_error(got[name], want[name]) <= 1e-10 for name in want)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"k": (8, 2, 15)}, r"q and k must be \[R, H, K\].*\[8, 2, 15\]"),
        ({"g": (8, 2, 16)}, r"g must be \[8, 2\], or \[2\] for all rows, or None, got \[8, 2, 16\]"),
        ({"g": (8,)}, r"g must be \[8, 2\], or \[2\] for all rows, or None, got \[8\]"),
        ({"initial_state": (1, 2, 16, 32)}, r"initial_state must be \[2, 2, 16, 32\], got \[1, 2, 16, 32\]"),
    ],
)
def test_scalar_decay_refuses(change, message):
    leaves, cu_seqlens = inputs([5, 3])
    leaves |= {name: torch.zeros(shape, device=cu_seqlens.device) for name, shape in change.items()}
    q, k, v, g, state = leaves.values()
    with pytest.raises(ValueError, match=message):
        scalar_decay(q, k, v, g, cu_seqlens, initial_state=state)
