"""State passing: sequences cut along time into slices, each with the states and convolution inputs of the others.

Along a slice a memory's state changes by an affine map,

    S_after = T S_before + B

where the transition T depends on keys and gates alone, and the contribution B is the state after the slice from a start
with zeros. So all slices can compute their T and B at the same time, and the maps are composed afterwards. Gradients of
the states go back by the transposed maps. This module computes; the caller moves tensors between devices.

Shape legend: slices P, all memories A, segments N (the same ones in every slice), heads H, key size K, value size V,
convolution width W, channels C.
"""

from __future__ import annotations

import torch


def _times(transition: torch.Tensor, state: torch.Tensor, transposed: bool) -> torch.Tensor:
    """T S, or T^T S. A diagonal T is given as its diagonal, with one dimension less than S."""
    if transition.dim() < state.dim():
        return transition[..., None] * state
    return (transition.transpose(-1, -2) if transposed else transition) @ state


def compose(transitions: torch.Tensor) -> torch.Tensor:
    """T_{P-1} ... T_1 T_0, of consecutive slices: [P, N, H, K, K], or [P, N, H, K] for diagonal ones."""
    whole = transitions[0]
    for transition in transitions[1:]:
        whole = transition * whole if _is_diagonal(transition) else transition @ whole
    return whole


def _is_diagonal(transition: torch.Tensor) -> bool:
    """Whether T [N, H, K, K] or [N, H, K] is given as its diagonal."""
    return transition.dim() == 3


def fold_states(
    transitions: torch.Tensor, contributions: torch.Tensor, initial_state: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Computes the states between slices: ``S_0`` is the initial state, ``S_{p+1} = T_p S_p + B_p``.

    Args:
        transitions: T, [P, N, H, K, K], or [P, N, H, K] for diagonal ones; float32 or float64.
        contributions: B, [P, N, H, K, V], the state after each slice from a start with zeros.
        initial_state: [N, H, K, V]; zeros when absent.

    Returns:
        P + 1 states [N, H, K, V]: before each slice, and after the last slice.
    """
    states = [contributions.new_zeros(contributions.shape[1:]) if initial_state is None else initial_state]
    for transition, contribution in zip(transitions, contributions, strict=True):
        states.append(_times(transition, states[-1], False) + contribution)
    return states


def fold_gradients(
    transitions: torch.Tensor, initial_gradients: torch.Tensor, final_gradient: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Computes the loss's gradients of the states that :func:`fold_states` returns.

    ``G_P`` is the gradient of the state after the last slice, ``G_p = T_p^T G_{p+1} + D_p``.

    Args:
        transitions: T, as for :func:`fold_states`.
        initial_gradients: D, [P, N, H, K, V], the gradient of each slice's initial state through that slice's outputs
            alone.
        final_gradient: G_P, [N, H, K, V], the gradient of the state after the last slice; zeros when absent.

    Returns:
        P + 1 gradients [N, H, K, V]; number p + 1 is the final state's gradient in the backward pass of slice p.
    """
    zeros = initial_gradients.new_zeros(initial_gradients.shape[1:])
    gradients = [zeros if final_gradient is None else final_gradient]
    for transition, initial in zip(transitions.flip(0), initial_gradients.flip(0), strict=True):
        gradients.append(_times(transition, gradients[-1], True) + initial)
    return gradients[::-1]


class _LastInputs(torch.autograd.Function):
    """x itself, and the rows of x at an index [entries, segments, W - 1], zeros where not present."""

    @staticmethod
    def forward(ctx, x, index, present):
        ctx.save_for_backward(index, present)
        tail = x.index_select(0, index.flatten()).unflatten(0, index.shape)
        return x.view_as(x), tail.masked_fill(~present[..., None], 0)

    @staticmethod
    def backward(ctx, dx, dtail):
        index, present = ctx.saved_tensors
        dtail = dtail.masked_fill(~present[..., None], 0)
        dx = dx.clone()
        # No input appears twice within one entry of the first dimension, so that every sum has a fixed order.
        for where, gradient in zip(index, dtail, strict=True):
            dx.index_add_(0, where.flatten(), gradient.flatten(0, -2))
        return dx, None, None


def last_inputs(
    x: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    width: int,
    token_of_row: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the last W - 1 inputs of each segment, which a convolution of width W over the next slice reads.

    Args:
        x: [R, C], one input a row; with ``token_of_row`` one input a token.
        starts, ends: [A, N / A], each segment's first row, and the row after its last. With ``token_of_row``, the
            segments of one memory share no token.
        width: W.
        token_of_row: [R], the token of each row; absent where x has rows.

    Returns:
        x, and the tails [N, W - 1, C]: the last inputs of each segment, the latest last, zeros where there are fewer.
        Use the returned x in place of the argument: then one addition joins the two gradients of x.
    """
    index = ends.long()[..., None] - (width - 1) + torch.arange(width - 1, device=x.device)  # [A, N / A, W - 1]
    present = index >= starts.long()[..., None]
    index = torch.where(present, index, 0)
    if token_of_row is None:
        index, present = index.flatten(0, 1)[None], present.flatten(0, 1)[None]
    else:
        index = token_of_row[index].long()
    x, tail = _LastInputs.apply(x, index, present)
    return x, tail.flatten(0, 1)


def join_tails(tails: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Joins the tails of consecutive slices to the last W - 1 inputs of all these slices.

    Args:
        tails: [P, N, W - 1, C], the last inputs of each slice, the latest last, zeros where the slice has fewer.
        counts: [P, N] integers, the number of inputs in each slice. A count of W - 1 or more hides the slices before,
            also where the tail holds fewer inputs: give such a count where a sequence begins or ends in the slice.

    Returns:
        [N, W - 1, C]; zeros where all slices together have fewer inputs. Differentiable in tails.
    """
    slices, segments, places, channels = tails.shape
    if slices == 0:
        # These zeros stay part of the graph: the backward passes of other ranks wait for the one of this rank.
        return tails.sum(0)
    counts = counts.clamp(max=places)
    later = counts.flip(0).cumsum(0).flip(0) - counts  # [P, N], inputs in the slices after each slice
    # An input's age is 1 for the latest input, 2 for the one before, and so on.
    age = torch.arange(places, 0, -1, device=tails.device)  # [W - 1], of the joined tail's places
    within = age - later[..., None]  # [P, N, W - 1], the same input's age inside slice p
    here = (within >= 1) & (within <= counts[..., None])
    first = torch.arange(slices, device=tails.device)[:, None, None] * places
    source = torch.where(here, first + places - within, 0).sum(0)  # [N, W - 1]: at most one slice has the place
    flat = tails.transpose(0, 1).flatten(1, 2)  # [N, P (W - 1), C]
    joined = flat.gather(1, source[..., None].expand(segments, places, channels))
    return joined.masked_fill(~here.any(0)[..., None], 0)
