"""The weighted sum over those rows of a token that are on this rank, with gradients of rows and weights.

Shape legend: tokens N, rows R, channels C, memories of a token k.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.route.plan import RoutingPlan


def _sum(rows, row_of_choice, weights, kernels):
    """[N, C]: sum over i of weights[t, i] rows[row_of_choice[t, i]], without the choices of row -1."""
    if kernels == "triton" and rows.dtype != torch.float64:
        from linear_moe.parallel.weighted_rows_triton import weighted_sum_triton

        return weighted_sum_triton(rows.contiguous(), row_of_choice.contiguous(), weights.contiguous())
    dtype = compute_dtype(rows.dtype)
    products = _chosen(rows, row_of_choice).to(dtype) * weights.to(dtype)[..., None]
    return products.sum(1).to(rows.dtype)


def _products(rows, row_of_choice, tokens, kernels):
    """[N, k] in float32 (float64 for float64 rows): tokens[t] . rows[row_of_choice[t, i]], zero for row -1."""
    if kernels == "triton" and rows.dtype != torch.float64:
        from linear_moe.parallel.weighted_rows_triton import row_products_triton

        return row_products_triton(rows.contiguous(), row_of_choice.contiguous(), tokens.contiguous())
    dtype = compute_dtype(rows.dtype)
    return (_chosen(rows, row_of_choice).to(dtype) * tokens.to(dtype)[:, None]).sum(-1)


def _chosen(rows, row_of_choice):
    """[N, k, C], zeros for row -1, whatever the rows hold that no choice names."""
    chosen = rows.index_select(0, row_of_choice.clamp(min=0).flatten()).unflatten(0, row_of_choice.shape)
    return torch.where((row_of_choice >= 0)[..., None], chosen, 0)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weights, row_of_choice, choice_of_row, kernels):
        ctx.save_for_backward(rows, weights, row_of_choice, choice_of_row)
        ctx.kernels = kernels
        return _sum(rows, row_of_choice, weights, kernels)

    @staticmethod
    def backward(ctx, dy):
        rows, weights, row_of_choice, choice_of_row = ctx.saved_tensors
        dweights = _products(rows, row_of_choice, dy, ctx.kernels).to(weights.dtype)
        # Every row belongs to one choice, so that the rows' gradient is a gather too. Spare rows receive zeros.
        weight_of_row = weights.flatten().index_select(0, choice_of_row.clamp(min=0))[:, None]
        token_of_row = torch.where(choice_of_row >= 0, choice_of_row // weights.shape[1], -1)[:, None]
        return _sum(dy, token_of_row, weight_of_row, ctx.kernels), dweights, None, None, None


def weighted_sum(
    rows: torch.Tensor, weights: torch.Tensor, plan: RoutingPlan, choice_of_row: torch.Tensor, *, kernels: str = "auto"
) -> torch.Tensor:
    """``y[t] = sum over i of weights[t, i] rows[plan.row_of_choice[t, i]]``, over the rows that are here.

    Args:
        rows: [R, C].
        weights: [N, k] float32 (float64 for float64 rows).
        plan: the rows; -1 in ``row_of_choice`` for a row elsewhere.
        choice_of_row: [R] int32, token * k + choice; -1 for spare rows.
        kernels: "auto", "torch" or "triton".

    Returns:
        [N, C] in the rows' type, summed in float32 (float64 for float64 rows). The gradient of spare rows is zero.
    """
    kernels = resolve_kernels(kernels, rows)
    return _WeightedSum.apply(rows, weights, plan.row_of_choice, choice_of_row, kernels)
