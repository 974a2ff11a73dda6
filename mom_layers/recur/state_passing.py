"""Sequences cut into pieces of time: what a piece must hear from those before it and, backward, from those after it.

Along a piece a memory's state changes by an affine map, ``S_after = T S_before + B``: the transition T comes from keys
and gates alone, the contribution B is the state after a start from zero. So pieces can be worked on at once, and their
maps merged afterwards; the gradient goes back by the transposed maps. Nothing here knows where the pieces are.

Shape legend: pieces P, segments N (in every piece the same ones), heads H, key size K, value size V, convolution width
W, channels C.
"""

from __future__ import annotations

import torch


def _times(transition: torch.Tensor, state: torch.Tensor, transposed: bool) -> torch.Tensor:
    if transition.dim() < state.dim():
        return transition[..., None] * state
    return (transition.transpose(-1, -2) if transposed else transition) @ state


def fold_states(
    transitions: torch.Tensor, contributions: torch.Tensor, initial_state: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """States at the edges of pieces: ``S_0`` is the initial state, ``S_{p+1} = T_p S_p + B_p``.

    Args:
        transitions: [P, N, H, K, K], or [P, N, H, K] where they are diagonal; float32 (or float64).
        contributions: [P, N, H, K, V], the states after each piece from a start with zeros.
        initial_state: [N, H, K, V]; zeros when absent.

    Returns:
        P + 1 states [N, H, K, V]: before each piece, and after the last.
    """
    states = [contributions.new_zeros(contributions.shape[1:]) if initial_state is None else initial_state]
    for transition, contribution in zip(transitions, contributions, strict=True):
        states.append(_times(transition, states[-1], False) + contribution)
    return states


def fold_gradients(
    transitions: torch.Tensor, initial_gradients: torch.Tensor, final_gradient: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The loss's gradients of :func:`fold_states`' results: ``G_P`` is the final one, ``G_p = T_p^T G_{p+1} + D_p``.

    Args:
        transitions: as there.
        initial_gradients: D, [P, N, H, K, V]: of each piece's initial state, through that piece's outputs alone.
        final_gradient: [N, H, K, V], of the state after the last piece; zeros when absent.

    Returns:
        P + 1 gradients [N, H, K, V]; number p + 1 is what piece p's own backward pass takes for its final state.
    """
    zeros = initial_gradients.new_zeros(initial_gradients.shape[1:])
    gradients = [zeros if final_gradient is None else final_gradient]
    for transition, initial in zip(transitions.flip(0), initial_gradients.flip(0), strict=True):
        gradients.append(_times(transition, gradients[-1], True) + initial)
    return gradients[::-1]


class _LastInputs(torch.autograd.Function):
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
        # Within one entry of the first dimension no input comes twice: every sum has one order.
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
    """What a convolution of width W over the next piece reads of this one.

    Args:
        x: [R, C] rows, or tokens where ``token_of_row`` [R] says which token a row is.
        starts, ends: [G, N / G] first row and one past the last row of the segments. With ``token_of_row`` the segments
            of one of the G groups share no token.
        width: W.

    Returns:
        x itself, to be used in place of the argument so that one addition brings the tail's gradient to it, and the
        tail [N, W - 1, C]: the last inputs of each segment, the latest last, zeros where there are fewer.
    """
    index = ends.long()[..., None] - (width - 1) + torch.arange(width - 1, device=x.device)  # [G, N / G, W - 1]
    present = index >= starts.long()[..., None]
    index = torch.where(present, index, 0)
    if token_of_row is None:
        index, present = index.flatten(0, 1)[None], present.flatten(0, 1)[None]
    else:
        index = token_of_row[index].long()
    x, tail = _LastInputs.apply(x, index, present)
    return x, tail.flatten(0, 1)


def join_tails(tails: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The last W - 1 inputs of several pieces together.

    Args:
        tails: [P, N, W - 1, C], each piece's own last inputs, the latest last, zeros where it has fewer.
        counts: [P, N] how many inputs a piece has, integers. W - 1 or more hides the pieces before it, also where its
            tail holds fewer inputs: so a piece in which a sequence begins, or after which it ends, says it.

    Returns:
        [N, W - 1, C]; zeros where all pieces together have fewer. Differentiable in tails.
    """
    pieces, segments, places, channels = tails.shape
    if pieces == 0:  # zeros that stay part of the graph: the other ranks' backward passes wait for this one's
        return tails.sum(0)
    counts = counts.clamp(max=places)
    later = counts.flip(0).cumsum(0).flip(0) - counts  # inputs in the pieces after this one
    age = torch.arange(places, 0, -1, device=tails.device)  # of the joined tail's places
    within = age - later[..., None]  # [P, N, W - 1], age inside piece p
    here = (within >= 1) & (within <= counts[..., None])
    first = torch.arange(pieces, device=tails.device)[:, None, None] * places
    source = torch.where(here, first + places - within, 0).sum(0)  # [N, W - 1], of one piece at most
    flat = tails.transpose(0, 1).flatten(1, 2)  # [N, P (W - 1), C]
    joined = flat.gather(1, source[..., None].expand(segments, places, channels))
    return joined.masked_fill(~here.any(0)[..., None], 0)
