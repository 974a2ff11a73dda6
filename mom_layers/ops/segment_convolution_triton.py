"""The convolution over segments in Triton: launches, autograd, and the function that callers use.

Shape legend: R rows, N tokens, C channels, H heads, S segments, W taps.
"""

from __future__ import annotations

import torch
import triton
from torch.autograd.function import once_differentiable

from mom_layers.ops.rows_triton import sum_parts, sum_slots
from mom_layers.ops.segment_convolution_triton_kernels import (
    _backward_initial_tail_kernel,
    _backward_kernel,
    _forward_kernel,
    _tail_kernel,
)

# Rows a walk. A backward walk computes W - 1 rows twice, and leaves W x C sums of the weight's gradient behind.
FORWARD_RUN = 32
BACKWARD_RUN = 64
AHEAD = 4  # rows whose loads are under way together
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128, 256)


def _walk(x, weight, initial_tail, plan, gather, unit_length_heads, eps):
    """Grid's second axis, and what the two kernels that walk along rows share."""
    channels, width = weight.shape
    block = channels // unit_length_heads if unit_length_heads else min(256, max(16, triton.next_power_of_2(channels)))
    return triton.cdiv(channels, block), dict(
        x=x,
        weight=weight,
        initial_tail=initial_tail,
        token_of_row=plan.token_of_row if gather else None,
        position_of_row=plan.position_of_row,
        segment_of_row=plan.segment_of_row,
        stride_x=x.stride(0),
        num_rows=plan.num_rows,
        eps=eps,
        C=channels,
        W=width,
        UNIT_LENGTH=unit_length_heads is not None,
        AHEAD=AHEAD,
        BC=block,
        num_warps=1,
    )


def _segment_arguments(plan, channels, width):
    """Grid, and what the two kernels that run over segments share."""
    grid = (triton.cdiv(plan.num_segments, 16), triton.cdiv(channels, 128))
    segments = dict(cu_seqlens=plan.cu_seqlens, num_segments=plan.num_segments)
    return grid, dict(segments, C=channels, W=width, BS=16, BC=128, num_warps=4)


def run_forward(x, weight, initial_tail, plan, gather, unit_length_heads, output_tail, eps):
    """y [R, C], and the tail [S, W - 1, C] or None."""
    (channels, width), rows = weight.shape, plan.num_rows
    blocks, arguments = _walk(x, weight, initial_tail, plan, gather, unit_length_heads, eps)
    y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    _forward_kernel[(triton.cdiv(rows, FORWARD_RUN), blocks)](y=y, RUN=FORWARD_RUN, **arguments)
    if not output_tail:
        return y, None
    tail = torch.empty(plan.num_segments, width - 1, channels, dtype=x.dtype, device=x.device)
    grid, segments = _segment_arguments(plan, channels, width)
    _tail_kernel[grid](
        x=x,
        initial_tail=initial_tail,
        tail=tail,
        token_of_row=arguments["token_of_row"],
        stride_x=x.stride(0),
        **segments,
    )
    return y, tail


def weight_gradient_parts(weight, plan, channels=None):
    """Where :func:`run_backward` puts every run's share of weights' gradients: [runs, W, C] float32."""
    shape = (triton.cdiv(plan.num_rows, BACKWARD_RUN), weight.shape[1], channels or weight.shape[0])
    return torch.empty(shape, dtype=torch.float32, device=weight.device)


def run_backward(
    x, weight, initial_tail, plan, gather, unit_length_heads, eps, dy, dtail, needs_initial, parts, dx=None
):
    """Gradients of x (written to ``dx`` if given), and of the initial tail where it is needed.

    Fills ``parts`` [runs, W, C], which may be some channels of a wider tensor: their sum is the weight's gradient,
    transposed.
    """
    (channels, width), rows = weight.shape, plan.num_rows
    dy = x.new_zeros(rows, channels) if dy is None else dy if dy.stride(1) == 1 else dy.contiguous()
    dtail = None if dtail is None else dtail.contiguous()
    blocks, arguments = _walk(x, weight, initial_tail, plan, gather, unit_length_heads, eps)
    if dx is None:
        dx = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
    du = torch.empty(rows, channels, dtype=x.dtype, device=x.device) if needs_initial else None
    _backward_kernel[(parts.shape[0], blocks)](
        dy=dy,
        dtail=dtail,
        dx=dx,
        du=du,
        dweight_parts=parts,
        cu_seqlens=plan.cu_seqlens,
        stride_dy=dy.stride(0),
        stride_dx=dx.stride(0),
        stride_parts=parts.stride(1),
        RUN=BACKWARD_RUN,
        **arguments,
    )
    if gather:
        dx = sum_slots(dx, plan.row_of_slot)
    if not needs_initial:
        return dx, None
    dinitial_tail = torch.empty_like(initial_tail)
    grid, segments = _segment_arguments(plan, channels, width)
    _backward_initial_tail_kernel[grid](du=du, weight=weight, dtail=dtail, dinitial_tail=dinitial_tail, **segments)
    return dx, dinitial_tail


class SegmentConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, initial_tail, plan, gather, unit_length_heads, output_tail, eps):
        ctx.save_for_backward(x, weight, initial_tail)
        ctx.options = plan, gather, unit_length_heads, eps
        ctx.set_materialize_grads(False)
        return run_forward(x, weight, initial_tail, plan, gather, unit_length_heads, output_tail, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtail):
        weight, plan = ctx.saved_tensors[1], ctx.options[0]
        parts = weight_gradient_parts(weight, plan)
        needs_initial = ctx.needs_input_grad[2]
        dx, dinitial_tail = run_backward(*ctx.saved_tensors, *ctx.options, dy, dtail, needs_initial, parts)
        return dx, sum_parts(parts, weight.dtype, transpose=True), dinitial_tail, None, None, None, None, None


def check_arguments(x, weight, plan, gather, unit_length_heads, initial_tail):
    """Raises ValueError for what :func:`segment_convolution_triton` cannot take."""
    if x.dim() != 2 or x.dtype not in FLOATS or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            "x must be float32, bfloat16 or float16 [tokens or rows, C] with adjacent channels, "
            f"got {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )
    if weight.dim() != 2 or weight.dtype not in FLOATS or weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight must be [{x.shape[1]}, W] in 16 or 32 bits, got {weight.dtype} {list(weight.shape)}")
    channels, width = weight.shape
    if not 2 <= width <= 8:
        raise ValueError(f"weight is {width} wide; the kernels support 2 to 8")
    inputs = plan.row_of_slot.shape[0] if gather else plan.num_rows
    if x.shape[0] != inputs:
        raise ValueError(f"x has {x.shape[0]} rows; the plan has {inputs} {'tokens' if gather else 'rows'}")
    heads = unit_length_heads
    if heads is not None and (heads < 1 or channels % heads or channels // heads not in HEAD_SIZES):
        raise ValueError(f"{channels} channels in {heads} heads: unit length needs a head of {HEAD_SIZES} channels")
    expected = (plan.num_segments, width - 1, channels)
    if initial_tail is not None and (initial_tail.shape != expected or initial_tail.dtype not in FLOATS):
        raise ValueError(
            f"initial_tail must be {list(expected)} in 16 or 32 bits, "
            f"got {initial_tail.dtype} {list(initial_tail.shape)}"
        )


def segment_convolution_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan,
    gather: bool,
    unit_length_heads: int | None = None,
    initial_tail: torch.Tensor | None = None,
    output_tail: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Depthwise causal convolution inside every segment, SiLU, and unit length per head where heads are given.

        y_r = unit(SiLU(sum_j weight[:, W - 1 - j] x_{r - j}))        over the rows r - j of the same segment

    Args:
        x: [N, C] if ``gather`` (row r reads token ``plan.token_of_row[r]``), else [R, C]; float32, bfloat16 or float16.
            May be a slice of a wider tensor's columns: it is not copied.
        weight: [C, W], W from 2 to 8; the last column multiplies the row itself.
        plan: the RoutingPlan.
        gather: read tokens instead of rows.
        unit_length_heads: H, to divide each head's C / H channels (16, 32, 64, 128 or 256) by their length.
        initial_tail: [S, W - 1, C], the inputs before every segment, the latest last; zeros if None.
        output_tail: also return the last W - 1 inputs of every segment.
        eps: added to the squared length.

    Returns:
        y [R, C] and the tail [S, W - 1, C] (None unless asked for), both in x's dtype. All sums are in float32.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    check_arguments(x, weight, plan, gather, unit_length_heads, initial_tail)
    if initial_tail is not None:
        initial_tail = initial_tail.contiguous()
    return SegmentConvolution.apply(
        x, weight.contiguous(), initial_tail, plan, gather, unit_length_heads, output_tail, eps
    )
