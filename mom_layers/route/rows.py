"""Tokens to rows: every token's vector copied to the rows that the routing plan gives it; and back."""

from __future__ import annotations

import torch

from mom_layers.route.plan import RoutingPlan


class _GatherRows(torch.autograd.Function):
    """A gather whose backward is a gather too: a token's rows are known, so nothing needs atomics."""

    @staticmethod
    def forward(ctx, x, token_of_row, row_of_choice):
        ctx.save_for_backward(row_of_choice)
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, grad):
        (row_of_choice,) = ctx.saved_tensors
        if grad.is_cuda and grad.dtype != torch.float64:
            from mom_layers.route.rows_triton import sum_slots

            return sum_slots(grad.contiguous(), row_of_choice), None, None
        slots = grad.index_select(0, row_of_choice.flatten()).unflatten(0, row_of_choice.shape)
        return slots.sum(1), None, None


def gather_rows(x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """x [N, C] to rows [R, C]: ``rows[r] = x[plan.token_of_row[r]]``. Deterministic in both directions."""
    return _GatherRows.apply(x, plan.token_of_row, plan.row_of_choice)


def rows_of_tokens(rows: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """The inverse of :func:`gather_rows` where every token has one row: rows [R, C] in the order of their tokens."""
    return _GatherRows.apply(rows, plan.row_of_choice.flatten(), plan.token_of_row[:, None])
