"""One linear map a memory, over the rows that the memory receives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mom_layers.common.kernels import resolve_kernels
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.rows import gather_rows

ALIGNMENT = 8  # numbers of 16 bits: the rows of PyTorch's grouped product are multiples of 16 bytes


def has_device_grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product keeps its offsets on the device: bf16, Hopper or newer, aligned tokens."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and weight.shape[2] % ALIGNMENT == 0
    )


class _GroupedProduct(torch.autograd.Function):
    """PyTorch's grouped product over gathered tokens, which are gathered again and not kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, plan):
        ctx.columns = weight.shape[1]
        weight = F.pad(weight, (0, 0, 0, -ctx.columns % ALIGNMENT)) if ctx.columns % ALIGNMENT else weight
        ctx.save_for_backward(x, weight)
        ctx.plan = plan
        rows = x.index_select(0, plan.token_of_row)
        return F.grouped_mm(rows, weight.transpose(1, 2), offs=plan.memory_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        from mom_layers.route.rows_triton import sum_rows_triton

        (x, weight), plan = ctx.saved_tensors, ctx.plan
        dx = dweight = None
        if ctx.needs_input_grad[1]:
            rows = x.index_select(0, plan.token_of_row)
            dweight = F.grouped_mm(dy.t(), rows, offs=plan.memory_offsets)[:, : ctx.columns]
            del rows
        if ctx.needs_input_grad[0]:
            dx = sum_rows_triton(F.grouped_mm(dy, weight, offs=plan.memory_offsets), plan.row_of_choice)
        return dx, dweight, None


def _projection_torch(x, weight, plan):
    if has_device_grouped_mm(x, weight):
        return _GroupedProduct.apply(x, weight, plan)
    rows = gather_rows(x, plan)
    ends = plan.memory_offsets.tolist()  # the host reads the sizes: this path is for the CPU and for comparison
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return torch.cat([F.linear(part, w) for part, w in zip(rows.split(sizes), weight, strict=True)])


def grouped_projection(
    x: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, *, kernels: str = "auto"
) -> torch.Tensor:
    """``rows[r] = weight[memory of r] @ x[token of r]``: the keys, values and gates of every row in one product, in
    autocast's type where that is on.

    Args:
        x: [N, D] tokens.
        weight: [G, O, D], one matrix a memory, the shared memory's last.
        plan: the rows.

    Returns:
        rows [R, O], or a few more columns of zeros where a product wants its rows aligned.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.dim() != 2 or x.shape[0] != plan.row_of_choice.shape[0]:
        raise ValueError(f"x must be [{plan.row_of_choice.shape[0]}, D], got {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[0] != plan.num_all_memories or weight.shape[2] != x.shape[1]:
        raise ValueError(f"weight must be [{plan.num_all_memories}, O, {x.shape[1]}], got {list(weight.shape)}")
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:  # a product as any other
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if resolve_kernels(kernels, x) == "triton" and not has_device_grouped_mm(x, weight):
        from mom_layers.project.triton import grouped_projection_triton

        return grouped_projection_triton(x, weight, plan)
    return _projection_torch(x, weight, plan)
