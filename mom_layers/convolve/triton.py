"""The convolution over segments in Triton: launches, autograd, and the function that callers use.

Shape legend: R rows, N tokens, C channels, H heads, S segments, W taps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch.autograd.function import once_differentiable

from mom_layers.common.sums_triton import sum_parts
from mom_layers.convolve.tails_triton import _backward_initial_tail_kernel, _tail_kernel
from mom_layers.convolve.walk_triton import _backward_kernel, _forward_kernel
from mom_layers.route.rows_triton import sum_rows_triton

# Rows a walk, powers of two: the fastest of four pairs that were timed on an H200. A backward walk computes W - 1 rows
# twice, and leaves W x C sums of the weight's gradient behind.
FORWARD_RUN = 64
BACKWARD_RUN = 128
AHEAD = 4  # rows whose loads are under way together
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128, 256)


class Convolution(NamedTuple):
    """One of several convolutions over the same rows, all of one width W."""

    x: torch.Tensor  # [R, C], or [N, C] if gathered
    weight: torch.Tensor  # [C, W]
    initial_tail: torch.Tensor | None  # [S, W - 1, C]
    gather: bool
    unit_length_heads: int | None


def _walks(convolutions, plan, eps, columns):
    """Grid's second axis, and what the two kernels that walk along rows share."""
    first, blocks = [0], []
    for convolution in convolutions:
        channels, heads = convolution.weight.shape[0], convolution.unit_length_heads
        block = channels // heads if heads else min(256, max(16, triton.next_power_of_2(channels)))
        blocks.append(block)
        first.append(first[-1] + triton.cdiv(channels, block))
    xs, weights, tails, gathers, heads = (tuple(part) for part in zip(*convolutions, strict=True))
    return first[-1] + bool(columns), dict(
        x=xs,
        weight=weights,
        initial_tail=tails,
        token_of_row=tuple(plan.token_of_row if gather else None for gather in gathers),
        segment_of_row=plan.segment_of_row,
        cu_seqlens=plan.cu_seqlens,
        num_rows=plan.num_rows,
        eps=eps,
        STRIDE_X=tuple(x.stride(0) for x in xs),
        C=tuple(weight.shape[0] for weight in weights),
        W=weights[0].shape[1],
        UNIT_LENGTH=tuple(count is not None for count in heads),
        BC=tuple(blocks),
        FIRST=tuple(first),
        COLUMNS=columns,
        BG=triton.next_power_of_2(max(1, columns)),
        AHEAD=AHEAD,
        num_warps=1,
    )


def _segment_arguments(plan, channels, width):
    """Grid, and what the two kernels that run over segments share."""
    grid = (triton.cdiv(plan.num_segments, 16), triton.cdiv(channels, 128))
    segments = dict(cu_seqlens=plan.cu_seqlens, num_segments=plan.num_segments)
    return grid, dict(segments, C=channels, W=width, BS=16, BC=128, num_warps=4)


def run_forward(convolutions, plan, output_tail, eps, copied=None):
    """The outputs [R, C], the tails [S, W - 1, C] or None, and a contiguous copy of ``copied`` [R, columns], whose
    columns are adjacent, or None."""
    rows = plan.num_rows
    ys = tuple(x.new_empty(rows, weight.shape[0]) for x, weight, *_ in convolutions)
    columns = 0 if copied is None else copied.shape[1]
    copy = copied.new_empty(copied.shape) if columns else None
    blocks, arguments = _walks(convolutions, plan, eps, columns)
    _forward_kernel[(triton.cdiv(rows, FORWARD_RUN), blocks)](
        y=ys,
        copied=copied if columns else None,
        copy=copy,
        STRIDE_COPIED=copied.stride(0) if columns else 0,
        RUN=FORWARD_RUN,
        **arguments,
    )
    tails = tuple(_final_tail(convolution, plan) if output_tail else None for convolution in convolutions)
    return ys, tails, copy


def _final_tail(convolution, plan):
    x, (channels, width) = convolution.x, convolution.weight.shape
    tail = x.new_empty(plan.num_segments, width - 1, channels)
    grid, segments = _segment_arguments(plan, channels, width)
    _tail_kernel[grid](
        x=x,
        initial_tail=convolution.initial_tail,
        tail=tail,
        token_of_row=plan.token_of_row if convolution.gather else None,
        stride_x=x.stride(0),
        **segments,
    )
    return tail


def run_backward(convolutions, plan, eps, dys, dtails, needs_initial, dxs, copied=None, copy=None):
    """Gradients of the inputs (written to ``dxs`` where one is given), of the weights, and of the initial tails where
    they are needed; three tuples. Also copies ``copied`` [R, columns] to ``copy``, whose columns are adjacent."""
    rows, width = plan.num_rows, convolutions[0].weight.shape[1]
    sizes = [weight.shape[0] for _, weight, *_ in convolutions]
    dys = tuple(
        x.new_zeros(rows, size) if dy is None else dy if dy.stride(1) == 1 else dy.contiguous()
        for (x, *_), size, dy in zip(convolutions, sizes, dys, strict=True)
    )
    dtails = tuple(None if dtail is None else dtail.contiguous() for dtail in dtails)
    dxs = tuple(
        x.new_empty(rows, size) if dx is None else dx
        for (x, *_), size, dx in zip(convolutions, sizes, dxs, strict=True)
    )
    dus = tuple(
        x.new_empty(rows, size) if needed else None
        for (x, *_), size, needed in zip(convolutions, sizes, needs_initial, strict=True)
    )
    # All weights' gradients as one, so that they are summed up in one launch.
    shape = (triton.cdiv(rows, BACKWARD_RUN), width, sum(sizes))
    parts = torch.empty(shape, dtype=torch.float32, device=plan.token_of_row.device)
    columns = 0 if copied is None else copied.shape[1]
    blocks, arguments = _walks(convolutions, plan, eps, columns)
    _backward_kernel[(shape[0], blocks)](
        dy=dys,
        dtail=dtails,
        dx=dxs,
        du=dus,
        dweight_parts=parts.split(sizes, dim=2),
        copied=copied.contiguous() if columns else None,
        copy=copy if columns else None,
        STRIDE_DY=tuple(dy.stride(0) for dy in dys),
        STRIDE_DX=tuple(dx.stride(0) for dx in dxs),
        STRIDE_PARTS=parts.stride(1),
        STRIDE_COPY=copy.stride(0) if columns else 0,
        RUN=BACKWARD_RUN,
        **arguments,
    )
    dweights = sum_parts(parts, convolutions[0].weight.dtype, transpose=True).split(sizes)
    dinitial_tails = tuple(
        _initial_tail_gradient(convolution, plan, du, dtail) if needed else None
        for convolution, du, dtail, needed in zip(convolutions, dus, dtails, needs_initial, strict=True)
    )
    dxs = tuple(
        sum_rows_triton(dx, plan.row_of_choice) if convolution.gather else dx
        for convolution, dx in zip(convolutions, dxs, strict=True)
    )
    return dxs, dweights, dinitial_tails


def _initial_tail_gradient(convolution, plan, du, dtail):
    weight, dinitial_tail = convolution.weight, torch.empty_like(convolution.initial_tail)
    grid, segments = _segment_arguments(plan, *weight.shape)
    _backward_initial_tail_kernel[grid](du=du, weight=weight, dtail=dtail, dinitial_tail=dinitial_tail, **segments)
    return dinitial_tail


class SegmentConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, initial_tail, plan, gather, unit_length_heads, output_tail, eps):
        ctx.save_for_backward(x, weight, initial_tail)
        ctx.plan, ctx.options, ctx.eps = plan, (gather, unit_length_heads), eps
        ctx.set_materialize_grads(False)
        convolution = Convolution(x, weight, initial_tail, gather, unit_length_heads)
        (y,), (tail,), _ = run_forward((convolution,), plan, output_tail, eps)
        return y, tail

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtail):
        convolution = Convolution(*ctx.saved_tensors, *ctx.options)
        (dx,), (dweight,), (dinitial_tail,) = run_backward(
            (convolution,), ctx.plan, ctx.eps, (dy,), (dtail,), (ctx.needs_input_grad[2],), (None,)
        )
        return dx, dweight, dinitial_tail, None, None, None, None, None


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
    inputs = plan.row_of_choice.shape[0] if gather else plan.num_rows
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
