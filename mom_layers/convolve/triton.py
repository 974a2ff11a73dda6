"""The convolution over segments in Triton: the kernels of its tails, and the functions that launch all its kernels.

A tail is what a convolution carries from one call to the next: the last W - 1 inputs of a segment.

Shape legend: R rows, N tokens, C channels, H heads, S segments, W taps. Tiles of tails are BS segments by BC channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mom_layers.common.sums_triton import sum_parts
from mom_layers.convolve.walk_triton import _backward_kernel, _forward_kernel
from mom_layers.route.rows_triton import sum_rows_triton

# Rows that a program walks along, powers of two: the fastest of four pairs that were timed on an H200. A backward walk
# computes W - 1 rows twice, and writes W x C sums of the weight's gradient.
FORWARD_RUN = 64
BACKWARD_RUN = 128
AHEAD = 4  # rows whose loads are under way together; not tuned
TAIL_TILE = (16, 128)  # BS and BC; not tuned
COPIED_COLUMNS = 64  # most columns that a program copies, a power of two; not tuned


@triton.jit
def _input(
    x, stride_x, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c, j,
    C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """[BS, BC] float32 inputs j rows before rows b_r; before a segment's first row its initial tail, or zero."""
    # An input is either a row of the segment or an entry of its initial tail: the sum of two masked loads.
    m_inside = m_r & (b_position >= j)
    b_from = b_r - j
    if token_of_row is not None:
        b_from = tl.load(token_of_row + b_from, mask=m_inside, other=0)  # [BS]
    p_x = x + b_from.to(tl.int64)[:, None] * stride_x + b_c[None, :]
    b_x = tl.load(p_x, mask=m_inside[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
    if initial_tail is not None:
        m_before = m_r & (b_position < j)
        b_at = b_segment.to(tl.int64) * (W - 1) + (W - 1 + b_position - j)
        p_tail = initial_tail + b_at[:, None] * C + b_c[None, :]
        b_x += tl.load(p_tail, mask=m_before[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
    return b_x


@triton.jit(do_not_specialize=["num_segments"])
def _tail_kernel(
    x, initial_tail, tail, token_of_row, cu_seqlens, num_segments,
    stride_x: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of every segment: entry W - 1 - j is the input j rows before the row after the last row."""
    b_s = tl.program_id(0) * BS + tl.arange(0, BS)
    m_s = b_s < num_segments
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_end = tl.load(cu_seqlens + b_s + 1, mask=m_s, other=0)  # [BS]
    b_length = b_end - tl.load(cu_seqlens + b_s, mask=m_s, other=0)  # [BS]
    for j in tl.static_range(1, W):
        b_x = _input(x, stride_x, token_of_row, initial_tail, b_end, b_length, b_s, m_s, b_c, m_c, j, C, W)
        p_tail = tail + (b_s.to(tl.int64) * (W - 1) + (W - 1 - j))[:, None] * C + b_c[None, :]
        tl.store(p_tail, b_x.to(tail.dtype.element_ty), mask=m_s[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_segments"])
def _backward_initial_tail_kernel(
    du, weight, dtail, dinitial_tail, cu_seqlens, num_segments,
    C: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of the initial tails, from du (before SiLU) and from the gradient of the final tails.

    The rows t = 0 to i of a segment read entry i of its initial tail, with tap W - 1 - i + t; in a segment shorter than
    W - 1 rows the entry is also entry i - length of the final tail.
    """
    b_s = tl.program_id(0) * BS + tl.arange(0, BS)
    m_s = b_s < num_segments
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_start = tl.load(cu_seqlens + b_s, mask=m_s, other=0)  # [BS]
    b_length = tl.load(cu_seqlens + b_s + 1, mask=m_s, other=0) - b_start  # [BS]
    for i in tl.static_range(W - 1):
        # sum over t of weight[:, i - t] du[first row + t]
        b_d = tl.zeros([BS, BC], dtype=tl.float32)
        for t in tl.static_range(i + 1):
            b_w = tl.load(weight + b_c * W + (i - t), mask=m_c, other=0.0).to(tl.float32)  # [BC]
            m_du = m_s & (t < b_length)
            p_du = du + (b_start + t).to(tl.int64)[:, None] * C + b_c[None, :]
            b_du = tl.load(p_du, mask=m_du[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
            b_d += b_w[None, :] * b_du
        # What remains of the initial tail at the segment's end.
        if dtail is not None:
            m_tail = m_s & (b_length <= i)
            p_tail = dtail + (b_s.to(tl.int64) * (W - 1) + (i - b_length))[:, None] * C + b_c[None, :]
            b_d += tl.load(p_tail, mask=m_tail[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
        p_d = dinitial_tail + (b_s.to(tl.int64) * (W - 1) + i)[:, None] * C + b_c[None, :]
        tl.store(p_d, b_d.to(dinitial_tail.dtype.element_ty), mask=m_s[:, None] & m_c[None, :])


class Convolution(NamedTuple):
    """One of the convolutions of a launch, all over the same rows and of one width W."""

    x: torch.Tensor  # [R, C], or [N, C] with gather
    weight: torch.Tensor  # [C, W]
    initial_tail: torch.Tensor | None  # [S, W - 1, C]
    gather: bool  # row r reads x[token_of_row[r]]
    unit_length_heads: int | None  # H, or None to leave the length
    silu: bool = True  # or the sum over the taps itself


def _walks(convolutions, plan, eps, columns):
    """The size of the grid's second axis, and the arguments that both kernels of walk_triton take."""
    # A block of channels is one head where heads are brought to unit length, whose sum a program computes alone.
    first, blocks = [0], []
    for convolution in convolutions:
        channels, heads = convolution.weight.shape[0], convolution.unit_length_heads
        block = channels // heads if heads else min(256, max(16, triton.next_power_of_2(channels)))
        blocks.append(block)
        first.append(first[-1] + triton.cdiv(channels, block))
    # Triton takes a tuple for each argument, with one item for each convolution.
    xs, weights, tails, gathers, heads, silu = (tuple(part) for part in zip(*convolutions, strict=True))
    copied_block = min(COPIED_COLUMNS, triton.next_power_of_2(max(1, columns)))
    return first[-1] + triton.cdiv(columns, copied_block), dict(
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
        SILU=silu,
        UNIT_LENGTH=tuple(count is not None for count in heads),
        BC=tuple(blocks),
        FIRST=tuple(first),
        COLUMNS=columns,
        BG=copied_block,
        AHEAD=AHEAD,
        num_warps=1,
    )


def _segment_arguments(plan, channels, width):
    """The grid and the arguments that both kernels of tails take."""
    BS, BC = TAIL_TILE
    grid = (triton.cdiv(plan.num_segments, BS), triton.cdiv(channels, BC))
    segments = dict(cu_seqlens=plan.cu_seqlens, num_segments=plan.num_segments)
    return grid, dict(segments, C=channels, W=width, BS=BS, BC=BC, num_warps=4)


def convolve_forward(
    convolutions: tuple[Convolution, ...],
    plan,
    output_tail: bool,
    eps: float,
    copied: torch.Tensor | None = None,
    gather_copied: bool = False,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...], torch.Tensor | None]:
    """Runs several convolutions in one launch.

    Args:
        plan: the :class:`~mom_layers.route.plan.RoutingPlan`.
        output_tail: also return the last W - 1 inputs of every segment.
        eps: added to the squared length of a head.
        copied: [R, columns] with adjacent columns, which the same launch copies.
        gather_copied: ``copied`` is [N, columns], and row r of the copy is the row's token.

    Returns:
        the outputs [R, C], the tails [S, W - 1, C] or None, and a contiguous copy [R, columns] of ``copied`` or None.
    """
    rows = plan.num_rows
    # The outputs are contiguous, whatever tensor the inputs are slices of.
    ys = tuple(x.new_empty(rows, weight.shape[0]) for x, weight, *_ in convolutions)
    columns = 0 if copied is None else copied.shape[1]
    copy = copied.new_empty(rows, columns) if columns else None
    blocks, arguments = _walks(convolutions, plan, eps, columns)
    _forward_kernel[(triton.cdiv(rows, FORWARD_RUN), blocks)](
        y=ys,
        copied=copied if columns else None,
        copy=copy,
        token_of_copy=plan.token_of_row if columns and gather_copied else None,
        STRIDE_COPIED=copied.stride(0) if columns else 0,
        RUN=FORWARD_RUN,
        **arguments,
    )
    tails = tuple(_final_tail(convolution, plan) if output_tail else None for convolution in convolutions)
    return ys, tails, copy


def _final_tail(convolution, plan):
    """The last W - 1 inputs of every segment, [S, W - 1, C]."""
    x, (channels, width) = convolution.x, convolution.weight.shape
    tail = x.new_empty(plan.num_segments, width - 1, channels)
    if width == 1:
        return tail
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


def _initial_tail_gradient(convolution, plan, du, dtail):
    """The gradient [S, W - 1, C] of a convolution's initial tail, from du [R, C], the gradient before SiLU."""
    weight, dinitial_tail = convolution.weight, torch.empty_like(convolution.initial_tail)
    if weight.shape[1] == 1:
        return dinitial_tail
    grid, segments = _segment_arguments(plan, *weight.shape)
    _backward_initial_tail_kernel[grid](du=du, weight=weight, dtail=dtail, dinitial_tail=dinitial_tail, **segments)
    return dinitial_tail


def convolve_backward(
    convolutions: tuple[Convolution, ...],
    plan,
    eps: float,
    dys: tuple[torch.Tensor | None, ...],
    dtails: tuple[torch.Tensor | None, ...],
    needs_initial: tuple[bool, ...],
    dxs: tuple[torch.Tensor | None, ...],
    copied: torch.Tensor | None = None,
    copy: torch.Tensor | None = None,
    to_tokens: bool = False,
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """The gradients of several convolutions, whose rows are one launch.

    Args:
        dys: [R, C] gradients of the outputs; None for zeros.
        dtails: [S, W - 1, C] gradients of the tails; None for zeros.
        needs_initial: which initial tails need a gradient.
        dxs: where the inputs' gradients are written, [R, C] with adjacent columns; None for a new tensor.
        copied, copy: [R, columns]; the same launch copies ``copied`` to ``copy``, which has adjacent columns.
        to_tokens: every token has one row, and the inputs' gradients and the copy are written in the order of the
            tokens, [N, C].

    Returns:
        the gradients of the inputs, of the weights, and of the initial tails (None where no gradient is needed).
    """
    rows, width = plan.num_rows, convolutions[0].weight.shape[1]
    sizes = [weight.shape[0] for _, weight, *_ in convolutions]
    # A convolution without a gradient still runs with the others, on zeros.
    dys = tuple(
        x.new_zeros(rows, size) if dy is None else dy if dy.stride(1) == 1 else dy.contiguous()
        for (x, *_), size, dy in zip(convolutions, sizes, dys, strict=True)
    )
    dtails = tuple(None if dtail is None else dtail.contiguous() for dtail in dtails)
    dxs = tuple(
        x.new_empty(rows, size) if dx is None else dx
        for (x, *_), size, dx in zip(convolutions, sizes, dxs, strict=True)
    )
    # du is written only where an initial tail needs its gradient.
    dus = tuple(
        x.new_empty(rows, size) if needed else None
        for (x, *_), size, needed in zip(convolutions, sizes, needs_initial, strict=True)
    )
    # The partial sums of all weights' gradients are one tensor, so that one launch adds them up.
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
        token_of_dx=plan.token_of_row if to_tokens else None,
        token_of_copy=plan.token_of_row if columns and to_tokens else None,
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
    # A token's gradient is the sum over its rows.
    dxs = tuple(
        sum_rows_triton(dx, plan.row_of_choice) if convolution.gather and not to_tokens else dx
        for convolution, dx in zip(convolutions, dxs, strict=True)
    )
    return dxs, dweights, dinitial_tails
