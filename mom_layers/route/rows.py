"""Tokens to rows: copies every token's vector to the rows that the routing plan gives the token; and back.

Shape legend: tokens N, rows R, channels C, choices of a token k + 1 (k without the shared memory).
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.route.plan import RoutingPlan


def sum_rows(rows: torch.Tensor, row_of_choice: torch.Tensor, kernels: str) -> torch.Tensor:
    """Adds up every token's rows: the gradient of :func:`gather_rows`.

    Args:
        rows: [R, C].
        row_of_choice: [N, k + 1] int32, every token's rows; -1 where a choice has no row.
        kernels: "torch" or "triton". PyTorch adds up float64 rows whatever ``kernels`` says.

    Returns:
        [N, C] in the rows' type; sums are in float32 (float64 for float64 rows).
    """
    if kernels == "triton" and rows.dtype != torch.float64:
        from mom_layers.route.rows_triton import sum_rows_triton

        return sum_rows_triton(rows.contiguous(), row_of_choice)
    # A gather and a sum: the number of a token's choices is the same for all tokens.
    present = row_of_choice >= 0
    chosen = rows.index_select(0, row_of_choice.clamp(min=0).flatten()).unflatten(0, row_of_choice.shape)
    return torch.where(present[..., None], chosen, 0).sum(1)


def select_rows(x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
    """x [N, C] of tokens to rows [R, C], without a gradient; x itself where rows are tokens."""
    return x if plan.rows_are_tokens else x.index_select(0, plan.token_of_row)


def sum_rows_of_plan(rows: torch.Tensor, plan: RoutingPlan, kernels: str) -> torch.Tensor:
    """The gradient of :func:`select_rows`; ``rows`` itself where rows are tokens."""
    return rows if plan.rows_are_tokens else sum_rows(rows, plan.row_of_choice, kernels)


class _GatherRows(torch.autograd.Function):
    """A gather whose backward pass is a gather too: the plan lists a token's rows, so that nothing needs atomics."""

    @staticmethod
    def forward(ctx, x, token_of_row, row_of_choice, kernels):
        ctx.save_for_backward(row_of_choice)
        ctx.kernels = kernels
        return x.index_select(0, token_of_row)

    @staticmethod
    def backward(ctx, grad):
        return sum_rows(grad, *ctx.saved_tensors, ctx.kernels), None, None, None


def gather_rows(x: torch.Tensor, plan: RoutingPlan, *, kernels: str = "auto") -> torch.Tensor:
    """Copies tokens to rows: ``rows[r] = x[plan.token_of_row[r]]``. Both passes are deterministic.

    Args:
        x: [N, C] tokens, of any type.
        plan: the rows.
        kernels: "auto", "torch" or "triton": computes the sum over a token's rows in the backward pass.

    Returns:
        rows [R, C].

    Raises:
        ValueError: an unknown name in ``kernels``.
    """
    return _GatherRows.apply(x, plan.token_of_row, plan.row_of_choice, resolve_kernels(kernels, x))


def rows_of_tokens(rows: torch.Tensor, plan: RoutingPlan, *, kernels: str = "auto") -> torch.Tensor:
    """The inverse of :func:`gather_rows` for a plan with one row a token: rows [R, C] in the order of their tokens."""
    kernels = resolve_kernels(kernels, rows)
    # With one row a token the plan's two maps exchange their roles.
    return _GatherRows.apply(rows, plan.row_of_choice.flatten(), plan.token_of_row[:, None], kernels)
