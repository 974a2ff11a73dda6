"""One linear map for each memory, over the rows that the memory receives.

Shape legend: tokens N, rows R, all memories A, inputs D (the hidden size), outputs O.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mom_layers.common.checks import FLOATING, check_instance, check_tensors
from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.common.supported import FLOAT_TYPES
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.rows import gather_rows, select_rows, sum_rows_of_plan
from mom_layers.route.spare_rows import zero_spare_rows_

ALIGNMENT = 8  # numbers of 16 bits: PyTorch's grouped product takes matrices whose rows are multiples of 16 bytes


def has_device_grouped_mm(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product reads its offsets on the device: bf16, Hopper or newer, aligned tokens."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and torch.cuda.get_device_capability(x.device) >= (9, 0)
        and weight.shape[2] % ALIGNMENT == 0
    )


def _check(x: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan) -> None:
    check_instance(RoutingPlan, plan=plan)
    check_tensors(FLOATING, x=x)
    check_tensors(FLOATING, x.device, weight=weight)
    tokens = plan.row_of_choice.shape[0]
    if x.dim() != 2 or x.shape[0] != tokens:
        raise ValueError(f"x must be [{tokens}, D] for this plan, got {list(x.shape)}")
    if weight.dim() != 3 or weight.shape[0] != plan.num_all_memories or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"weight must be [{plan.num_all_memories}, O, {x.shape[1]}] for this plan and x, got {list(weight.shape)}"
        )


def _check_for_triton(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dtype not in FLOAT_TYPES or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            "x must be float32, bfloat16 or float16 with adjacent channels for kernels='triton', "
            f"got {x.dtype} with strides {x.stride()}"
        )
    if weight.dtype != x.dtype:
        raise ValueError(f"weight must be {x.dtype} as x is for kernels='triton', got {weight.dtype}")


class _GroupedProduct(torch.autograd.Function):
    """PyTorch's grouped product over gathered tokens. The backward pass gathers the tokens again."""

    @staticmethod
    def forward(ctx, x, weight, plan, kernels):
        # Rows of zeros in the weight become columns of zeros in the result.
        ctx.columns = weight.shape[1]
        weight = F.pad(weight, (0, 0, 0, -ctx.columns % ALIGNMENT)) if ctx.columns % ALIGNMENT else weight
        ctx.save_for_backward(x, weight)
        ctx.plan, ctx.kernels = plan, kernels
        rows = select_rows(x, plan)
        # memory_offsets stays on the device: the host waits for nothing. The product leaves spare rows unwritten.
        out = F.grouped_mm(rows, weight.transpose(1, 2), offs=plan.memory_offsets)
        return zero_spare_rows_(out, plan, kernels=kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), plan = ctx.saved_tensors, ctx.plan
        dx = dweight = None
        # dweight[m] = sum over the rows r of memory m of dy[r] x[token of r]^T
        if ctx.needs_input_grad[1]:
            rows = select_rows(x, plan)
            dweight = F.grouped_mm(dy.t(), rows, offs=plan.memory_offsets)[:, : ctx.columns]
            del rows
        # dx[t] = sum over the rows r of token t of weight[memory of r]^T dy[r]
        if ctx.needs_input_grad[0]:
            drows = F.grouped_mm(dy, weight, offs=plan.memory_offsets)
            dx = sum_rows_of_plan(drows, plan, ctx.kernels)
        return dx, dweight, None, None


class _TritonProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, plan):
        from mom_layers.project.triton import project

        ctx.save_for_backward(x, weight)
        ctx.plan = plan
        return zero_spare_rows_(project(x, weight, plan, plan.token_of_row), plan, kernels="triton")

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        from mom_layers.project.triton import project, weight_gradient

        (x, weight), plan = ctx.saved_tensors, ctx.plan
        # The kernels read adjacent columns.
        if dy.stride(1) != 1:
            dy = dy.contiguous()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            drows = project(dy, weight.transpose(1, 2), plan, None)
            dx = sum_rows_of_plan(drows, plan, "triton")
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(dy, x, weight, plan)
        return dx, dweight, None


def _projection_torch(x, weight, plan):
    rows = gather_rows(x, plan, kernels="torch")
    ends = plan.memory_offsets.tolist()  # the host reads the sizes: this path is for the CPU and for comparison
    sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    spare = rows.shape[0] - sum(sizes)
    *parts, _ = rows.split([*sizes, spare])
    out = torch.cat([F.linear(part, w) for part, w in zip(parts, weight, strict=True)])
    return F.pad(out, (0, 0, 0, spare)) if spare else out


def grouped_projection(
    x: torch.Tensor, weight: torch.Tensor, plan: RoutingPlan, *, kernels: str = "auto"
) -> torch.Tensor:
    """Projects every row with its memory's weight: the keys, values and raw gates of all rows in one product.

    ``rows[r] = weight[memory of r] x[token of r]``

    Under autocast x and weight are cast to autocast's type first, as for any other product; float64 stays float64.

    Args:
        x: [N, D] tokens.
        weight: [A, O, D], one matrix for each memory, the shared memory's last.
        plan: the rows.
        kernels: "auto", "torch" or "triton", which takes x and weight of one type: float32, bfloat16 or float16, with
            adjacent channels in x. On Hopper and newer PyTorch's grouped product computes bfloat16 either way, and
            ``kernels`` decides how the backward pass adds up a token's rows. Elsewhere "torch" reads the number of
            rows of every memory on the host.

    Returns:
        rows [R, O] in x's type, zeros in spare rows. PyTorch's grouped product appends columns of zeros where O is no
        multiple of 8. Sums are in float32 (float64 for float64 inputs); Triton multiplies float32 inputs in full
        precision.

    Raises:
        ValueError: shapes, types or strides that do not fit.
    """
    kernels = resolve_kernels(kernels, x)
    _check(x, weight, plan)
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        # PyTorch casts for its own products; the kernels here are none of them.
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    # PyTorch's product comes first where the chip has it; the Triton kernels serve other chips and types.
    if has_device_grouped_mm(x, weight):
        return _GroupedProduct.apply(x, weight, plan, kernels)
    if kernels == "triton":
        _check_for_triton(x, weight)
        return _TritonProjection.apply(x, weight, plan)
    return _projection_torch(x, weight, plan)
