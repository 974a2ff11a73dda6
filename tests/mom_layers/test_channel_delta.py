"""The chunked delta rule with a decay a channel in PyTorch against the token-by-token loop, and its checks."""

import pytest
import torch
from comparison import DEVICE, relative_error

from mom_layers.recur.channel_delta import (
    channel_delta_rule,
    gated_delta_rule_2,
    initial_state_gradient,
    kimi_delta_attention,
)
from mom_layers.recur.channel_delta.reference import channel_delta_rule_reference

RAGGED = [0, 1, 2, 63, 64, 65, 0, 130]
NAMES = ("q", "k", "v", "g", "erase", "write", "initial_state")
# By head, as kda or as gated_deltanet2 has its strengths, or one of each.
STRENGTHS = {"numbers": (False, False), "channels": (True, True), "erase channels": (True, False)}
DECAYS = ("usual", "zero", "fast", "strong", "resets", "jumps")


def inputs(lengths, heads=2, key_size=16, value_size=32, dtype=torch.float64, decay="usual", strengths="numbers"):
    """Leaves by name, q and k of unit length, gates in float32 at least; and cu_seqlens.

    Decays: "fast" fits one level of blocks in some chunks and channels and not in others; "jumps" forgets everything at
    a few rows and little at the rows around them.
    """
    torch.manual_seed(sum(lengths) + key_size)
    rows = sum(lengths)
    q, k = (torch.nn.functional.normalize(torch.randn(rows, heads, key_size), dim=-1) for _ in range(2))
    usual, strong = -0.1 * torch.rand(q.shape), -20 - torch.rand(q.shape)
    g = {
        "usual": usual,
        "zero": 0 * usual,
        "fast": -4 * torch.rand(rows, heads, key_size),
        "strong": strong,
        "resets": torch.where(torch.rand(q.shape) < 0.3, strong, usual),
        "jumps": torch.where(torch.rand(rows, heads, 1) < 0.05, -300.0, usual),
    }[decay]
    erase_channels, write_channels = STRENGTHS[strengths]
    erase = torch.rand(rows, heads, key_size) if erase_channels else torch.rand(rows, heads)
    write = torch.rand(rows, heads, value_size) if write_channels else torch.rand(rows, heads)
    v, state = torch.randn(rows, heads, value_size), torch.randn(len(lengths), heads, key_size, value_size)
    exact = torch.promote_types(dtype, torch.float32)
    tensors = zip(NAMES, (q, k, v, g, erase, write, 0.3 * state), (dtype,) * 3 + (exact,) * 4, strict=True)
    leaves = {name: x.to(DEVICE, kind).requires_grad_() for name, x, kind in tensors}
    return leaves, torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)


def outputs_and_gradients(function, leaves, cu_seqlens, state=True, final=True):
    """function(q, k, v, g, erase, write, cu_seqlens, initial state or None) -> o, final state; gradients of both."""
    o, last = function(*(leaves[n] for n in NAMES[:6]), cu_seqlens, leaves["initial_state"] if state else None)
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

    def loop(*arguments):
        *rows, ends, initial_state = arguments
        return channel_delta_rule_reference(*rows, ends.cpu(), initial_state, scale)

    return outputs_and_gradients(loop, double, cu_seqlens, state, final)


def chunked(*arguments, scale=None, kernels="torch"):
    *rows, ends, state = arguments
    return channel_delta_rule(
        *rows, ends, initial_state=state, output_final_state=True, scale=scale, kernels=kernels
    )  # fmt: skip


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("dtype,bound", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@pytest.mark.parametrize("strengths", ["numbers", "channels"])
def test_the_chunked_path_agrees_with_the_loop(strengths, dtype, bound, decay):
    """float32 too keeps its digits where the state is forgotten inside a chunk."""
    leaves, cu_seqlens = inputs(RAGGED, dtype=dtype, decay=decay, strengths=strengths)
    got, want = outputs_and_gradients(chunked, leaves, cu_seqlens), expected(leaves, cu_seqlens)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) <= bound, errors
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items())


@pytest.mark.parametrize("lengths", [[1, 1, 1], [3, 0, 5], [17], [0, 0]])
def test_short_segments_and_a_scale(lengths):
    leaves, cu_seqlens = inputs(lengths, strengths="erase channels")

    def scaled(*arguments):
        return chunked(*arguments, scale=0.7)

    got, want = outputs_and_gradients(scaled, leaves, cu_seqlens), expected(leaves, cu_seqlens, scale=0.7)
    assert all(relative_error(got[name], want[name]) <= 1e-12 for name in want)


def test_a_segment_in_two_parts_equals_the_whole():
    leaves, cu_seqlens = inputs([150], decay="resets", strengths="channels")
    rows = [leaves[name].detach() for name in NAMES[:6]]
    whole, last = chunked(*rows, cu_seqlens, leaves["initial_state"].detach())
    state, parts = leaves["initial_state"].detach(), []
    for first, end in ((0, 1), (1, 70), (70, 150)):
        o, state = chunked(*(x[first:end] for x in rows), torch.tensor([0, end - first], dtype=torch.int32), state)
        parts.append(o)
    assert relative_error(torch.cat(parts), whole) <= 1e-12 and relative_error(state, last) <= 1e-12


@pytest.mark.parametrize("strengths", ["numbers", "channels"])
def test_the_initial_states_gradient_needs_no_values(strengths):
    leaves, cu_seqlens = inputs([5, 0, 70], strengths=strengths)
    q, k, v, g, erase, write, state = (leaves[name] for name in NAMES)
    o, _ = channel_delta_rule(q, k, v, g, erase, write, cu_seqlens, initial_state=state)
    do = torch.randn_like(o)
    (want,) = torch.autograd.grad(o, state, do)
    got = initial_state_gradient(q, k, g, erase, do, cu_seqlens)
    assert relative_error(got, want) <= 1e-12 and not got.requires_grad


def test_the_names_of_the_two_rules():
    """kda takes one strength for both; gated_deltanet2 takes one a channel."""
    leaves, cu_seqlens = inputs([9], strengths="channels")
    q, k, v, g, b, w, _ = (leaves[name] for name in NAMES)
    assert torch.equal(
        gated_delta_rule_2(q, k, v, g, b, w, cu_seqlens)[0], channel_delta_rule(q, k, v, g, b, w, cu_seqlens)[0]
    )
    beta = b[..., 0]
    same = kimi_delta_attention(q, k, v, g, beta, cu_seqlens)[0]
    spread = gated_delta_rule_2(q, k, v, g, beta[..., None].expand_as(k), beta[..., None].expand_as(v), cu_seqlens)[0]
    assert relative_error(same, spread) <= 1e-14


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"g": (9, 2)}, "g must be [9, 2, 16] as q is, got [9, 2]"),
        ({"erase": (9, 2, 32)}, "erase must be [9, 2] or [9, 2, 16], got [9, 2, 32]"),
        ({"write": (9, 2, 16)}, "write must be [9, 2] or [9, 2, 32], got [9, 2, 16]"),
        ({"initial_state": (1, 2, 32, 16)}, "initial_state must be [1, 2, 16, 32], got [1, 2, 32, 16]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    leaves, cu_seqlens = inputs([9])
    leaves |= {name: torch.zeros(shape, dtype=torch.float64, device=DEVICE) for name, shape in changes.items()}
    rows, state = [leaves[name] for name in NAMES[:6]], leaves["initial_state"]
    with pytest.raises(ValueError) as error:
        channel_delta_rule(*rows, cu_seqlens, initial_state=state)
    assert str(error.value) == message
