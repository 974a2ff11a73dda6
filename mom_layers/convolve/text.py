"""A causal convolution over the text itself, before the router: tokens that are neighbours there may go to different
memories, and a memory's own convolutions then see other neighbours.

Shape legend: sequences B, tokens N, hidden size D, filter width W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.convolve.operation import segment_convolution
from mom_layers.route.plan import RoutingPlan


def convolve_text(
    x: torch.Tensor,
    filters: torch.Tensor,
    plan: RoutingPlan,
    *,
    tail: torch.Tensor | None = None,
    output_tail: bool = False,
    sequence_slice=None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Adds to every token what a filter reads from the token and the tokens before it.

    ``y_t = x_t + sum_j filters[:, W - 1 - j] * x_{t - j}`` over the tokens t - j of the same sequence

    Args:
        x: [N, D] tokens.
        filters: [D, W], one filter a channel; ``filters[:, W - 1]`` multiplies the token itself.
        plan: of :func:`mom_layers.route.sequences.plan_sequences`.
        tail: [B, W - 1, D], the tokens before each sequence, the latest last; zeros when absent.
        output_tail: also return the last W - 1 tokens of every sequence.
        sequence_slice: a :class:`mom_layers.mixing.SequenceSlice`, given where other ranks hold the rest of the
            sequences; excludes ``tail`` and ``output_tail``.
        kernels: "auto", "torch" or "triton".

    Returns:
        y [N, D] and the tail [B, W - 1, D] (None without ``output_tail``), both in x's type.

    Raises:
        ValueError: a shape, size, type or stride that does not fit.
    """
    gathers = not plan.rows_are_tokens
    initial = None if tail is None else plan.to_segments(tail[:, None])
    if sequence_slice is not None:
        (x,), (initial,) = sequence_slice.tails(plan, (x,), (gathers,), filters.shape[1])
    y, last = segment_convolution(
        x, _with_token(filters), plan,
        gather=gathers, silu=False, initial_tail=initial, output_tail=output_tail, kernels=kernels,
    )  # fmt: skip
    if gathers:
        y = y.index_select(0, plan.row_of_choice[:, 0])
    return y, plan.from_segments(last)[:, 0] if output_tail else None


def convolve_next_token(x: torch.Tensor, filters: torch.Tensor, tail: torch.Tensor) -> torch.Tensor:
    """:func:`convolve_text` for one new token of every sequence; changes ``tail`` in place. No gradients.

    Args:
        x: [B, D].
        filters: [D, W].
        tail: [B, W - 1, D], the latest last.

    Returns:
        y [B, D].
    """
    inputs = torch.cat([tail.to(x.dtype), x[:, None]], dim=1)
    y = (inputs.to(compute_dtype(x.dtype)) * _with_token(filters).t()).sum(1)
    tail.copy_(inputs[:, 1:])
    return y.to(x.dtype)


def _with_token(filters: torch.Tensor) -> torch.Tensor:
    """Filters whose sum has the token itself too, [D, W] in the type of sums."""
    token = F.pad(filters.new_ones(1), (filters.shape[1] - 1, 0))
    return filters.to(compute_dtype(filters.dtype)) + token
