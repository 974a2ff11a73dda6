"""Spare rows of a plan whose number of rows is known on the device alone: zeros in place of what no kernel writes.

An operation that skips spare rows leaves their memory as it was, and sums over rows read that memory. Zeros in the
rows, and in their gradients, keep those sums right.

Shape legend: rows R, channels C.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.route.plan import RoutingPlan


def zero_spare_rows_(rows: torch.Tensor, plan: RoutingPlan, *, kernels: str = "auto") -> torch.Tensor:
    """Writes zeros into the spare rows of rows [R, ...], in place; rows in use are not touched.

    Args:
        rows: [R, ...], of any type.
        plan: the rows' plan. Without spare rows nothing is written.
        kernels: "auto", "torch" or "triton", which writes the spare rows alone; tensors that are not contiguous, and
            float64, take PyTorch either way.

    Returns:
        rows.

    Raises:
        ValueError: an unknown name in ``kernels``.
    """
    if not plan.has_spare_rows or not rows.numel():
        return rows
    kernels = resolve_kernels(kernels, rows)
    if kernels == "triton" and rows.is_contiguous() and rows.dtype != torch.float64:
        from mom_layers.route.rows_triton import zero_spare_rows_triton

        zero_spare_rows_triton(rows.flatten(1) if rows.dim() > 1 else rows[:, None], plan.num_rows_in_use)
        return rows
    spare = torch.arange(rows.shape[0], device=rows.device) >= plan.num_rows_in_use
    return rows.masked_fill_(spare.view(-1, *[1] * (rows.dim() - 1)), 0)


class _ZeroSpareGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plan, kernels, *tensors):
        ctx.plan, ctx.kernels = plan, kernels
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        # The gradients come from the operation that skipped the spare rows, so that nothing else reads these tensors.
        return None, None, *(
            None if gradient is None else zero_spare_rows_(gradient, ctx.plan, kernels=ctx.kernels)
            for gradient in gradients
        )  # fmt: skip


def zero_spare_gradients(
    tensors: tuple[torch.Tensor, ...], plan: RoutingPlan, *, kernels: str = "auto"
) -> tuple[torch.Tensor, ...]:
    """The same tensors [R, ...]; the backward pass writes zeros into the spare rows of their gradients, in place.

    For the inputs of an operation whose backward pass leaves spare rows unwritten.

    Args:
        tensors: each [R, ...].
        plan, kernels: as for :func:`zero_spare_rows_`.
    """
    return _ZeroSpareGradients.apply(plan, kernels, *tensors) if plan.has_spare_rows else tuple(tensors)
