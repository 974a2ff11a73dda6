"""Triton kernels of the convolution over segments, with SiLU and unit length, forward and backward.

The backward pass has two parts: the gradient of the convolution's output is computed row by row and stored, together
with per-program sums for the weight; then every input adds up the W outputs that read it (and, when gathering, those of
all its rows), so that nothing needs atomics.

Shape legend: R rows, N tokens, C channels, H heads, S segments, W taps. Tiles are BT rows by BC channels; with unit
length a tile's channels are one head. Tap j multiplies the input j rows earlier by weight[:, W - 1 - j]. Strides are
compile-time constants, so that a slice of a wider tensor is still read in vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 4096  # of a [BT, BC] tile: 32 values a thread with 4 warps; not tuned
GRADIENT_TILE_ELEMENTS = 1024  # the weight's gradient keeps W such tiles of sums: about 100 registers; not tuned
GRADIENT_PROGRAMS = 2048  # at most so many share the weight's gradient: 16 a multiprocessor of an H200; not tuned
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128, 256)


@triton.jit
def _input(
    x, stride_x, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c, j,
    C: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """[BT, BC] float32 inputs j rows before rows b_r; before a segment's first row its initial tail, or zero."""
    m_inside = m_r & (b_position >= j)
    b_from = b_r - j
    if token_of_row is not None:
        b_from = tl.load(token_of_row + b_from, mask=m_inside, other=0)  # [BT]
    p_x = x + b_from.to(tl.int64)[:, None] * stride_x + b_c[None, :]
    b_x = tl.load(p_x, mask=m_inside[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BT, BC]
    if initial_tail is not None:
        m_before = m_r & (b_position < j)
        b_at = b_segment.to(tl.int64) * (W - 1) + (W - 1 + b_position - j)
        p_tail = initial_tail + b_at[:, None] * C + b_c[None, :]
        b_x += tl.load(p_tail, mask=m_before[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BT, BC]
    return b_x


@triton.jit
def _convolve(
    x, stride_x, weight, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c,
    C: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b_u = tl.zeros([BT, BC], dtype=tl.float32)
    for j in tl.static_range(W):
        b_w = tl.load(weight + b_c * W + (W - 1 - j), mask=m_c, other=0.0).to(tl.float32)  # [BC]
        b_x = _input(x, stride_x, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c, j, C, W)
        b_u += b_w[None, :] * b_x
    return b_u


@triton.jit
def _rows_of_block(i_block, position_of_row, segment_of_row, num_rows, BT: tl.constexpr):
    b_r = i_block * BT + tl.arange(0, BT)
    m_r = b_r < num_rows
    b_position = tl.load(position_of_row + b_r, mask=m_r, other=0)  # [BT]
    b_segment = tl.load(segment_of_row + b_r, mask=m_r, other=0)  # [BT]
    return b_r, m_r, b_position, b_segment


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x, weight, initial_tail, y, token_of_row, position_of_row, segment_of_row, num_rows, eps, stride_x: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b_r, m_r, b_position, b_segment = _rows_of_block(tl.program_id(0), position_of_row, segment_of_row, num_rows, BT)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_u = _convolve(
        x, stride_x, weight, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c, C, W, BT, BC
    )
    b_y = b_u * tl.sigmoid(b_u)
    if UNIT_LENGTH:
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=1) + eps)[:, None]
    p_y = y + b_r.to(tl.int64)[:, None] * C + b_c[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_segments"])
def _tail_kernel(
    x, initial_tail, tail, token_of_row, cu_seqlens, num_segments,
    stride_x: tl.constexpr, C: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of every segment: what tap j of the row after its last one would read."""
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


@triton.jit(do_not_specialize=["num_rows"])
def _backward_output_kernel(
    x, weight, initial_tail, dy, du, dweight, token_of_row, position_of_row, segment_of_row,
    num_rows, eps, stride_x: tl.constexpr, stride_dy: tl.constexpr, BLOCKS: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradient du [R, C] before SiLU, and this program's share [W, C] of the weight's gradient."""
    i_program = tl.program_id(0)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_dw = ()
    for _ in tl.static_range(W):
        b_dw = b_dw + (tl.zeros([BT, BC], dtype=tl.float32),)
    for i in range(BLOCKS):
        i_block = i_program * BLOCKS + i
        b_r, m_r, b_position, b_segment = _rows_of_block(i_block, position_of_row, segment_of_row, num_rows, BT)
        m_tile = m_r[:, None] & m_c[None, :]
        b_u = _convolve(
            x, stride_x, weight, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c, C, W, BT, BC
        )
        p_dy = dy + b_r.to(tl.int64)[:, None] * stride_dy + b_c[None, :]
        b_dy = tl.load(p_dy, mask=m_tile, other=0.0).to(tl.float32)  # [BT, BC]
        b_sigmoid = tl.sigmoid(b_u)
        if UNIT_LENGTH:
            b_y = b_u * b_sigmoid
            b_scale = tl.rsqrt(tl.sum(b_y * b_y, axis=1) + eps)
            b_along = tl.sum(b_dy * b_y, axis=1) * b_scale * b_scale
            b_dy = (b_dy - b_y * b_along[:, None]) * b_scale[:, None]
        b_du = b_dy * b_sigmoid * (1.0 + b_u * (1.0 - b_sigmoid))
        p_du = du + b_r.to(tl.int64)[:, None] * C + b_c[None, :]
        tl.store(p_du, b_du.to(du.dtype.element_ty), mask=m_tile)
        b_sums = ()
        for j in tl.static_range(W):
            b_x = _input(x, stride_x, token_of_row, initial_tail, b_r, b_position, b_segment, m_r, b_c, m_c, j, C, W)
            b_sums = b_sums + (b_dw[j] + b_du * b_x,)
        b_dw = b_sums
    for j in tl.static_range(W):
        p_dw = dweight + (i_program * W + W - 1 - j).to(tl.int64) * C + b_c
        tl.store(p_dw, tl.sum(b_dw[j], axis=0), mask=m_c)


@triton.jit(do_not_specialize=["num_outputs"])
def _backward_input_kernel(
    du, weight, dtail, dx, row_of_slot, segment_of_row, cu_seqlens, num_outputs,
    C: tl.constexpr, W: tl.constexpr, SLOTS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of row n, or of token n: the sum over its rows of the W outputs that read them, and their place in a tail."""
    b_n = tl.program_id(0) * BT + tl.arange(0, BT)
    m_n = b_n < num_outputs
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_dx = tl.zeros([BT, BC], dtype=tl.float32)
    for i_slot in tl.static_range(SLOTS):
        b_r = b_n
        if row_of_slot is not None:
            b_r = tl.load(row_of_slot + b_n.to(tl.int64) * SLOTS + i_slot, mask=m_n, other=0)  # [BT]
        b_segment = tl.load(segment_of_row + b_r, mask=m_n, other=0)  # [BT]
        b_later = tl.load(cu_seqlens + b_segment + 1, mask=m_n, other=0) - 1 - b_r  # [BT] rows after this one
        for j in tl.static_range(W):
            b_w = tl.load(weight + b_c * W + (W - 1 - j), mask=m_c, other=0.0).to(tl.float32)  # [BC]
            m_du = m_n & (b_later >= j)
            p_du = du + (b_r + j).to(tl.int64)[:, None] * C + b_c[None, :]
            b_du = tl.load(p_du, mask=m_du[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BT, BC]
            b_dx += b_w[None, :] * b_du
        if dtail is not None:
            m_tail = m_n & (b_later < W - 1)
            b_at = b_segment.to(tl.int64) * (W - 1) + (W - 2 - b_later)
            p_tail = dtail + b_at[:, None] * C + b_c[None, :]
            b_dx += tl.load(p_tail, mask=m_tail[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BT, BC]
    p_dx = dx + b_n.to(tl.int64)[:, None] * C + b_c[None, :]
    tl.store(p_dx, b_dx.to(dx.dtype.element_ty), mask=m_n[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_segments"])
def _backward_initial_tail_kernel(
    du, weight, dtail, dinitial_tail, cu_seqlens, num_segments,
    C: tl.constexpr, W: tl.constexpr, BS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Entry i of an initial tail is read by the first i + 1 rows, and becomes entry i - length of the final tail."""
    b_s = tl.program_id(0) * BS + tl.arange(0, BS)
    m_s = b_s < num_segments
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_start = tl.load(cu_seqlens + b_s, mask=m_s, other=0)  # [BS]
    b_length = tl.load(cu_seqlens + b_s + 1, mask=m_s, other=0) - b_start  # [BS]
    for i in tl.static_range(W - 1):
        b_d = tl.zeros([BS, BC], dtype=tl.float32)
        for t in tl.static_range(i + 1):
            b_w = tl.load(weight + b_c * W + (i - t), mask=m_c, other=0.0).to(tl.float32)  # [BC]
            m_du = m_s & (t < b_length)
            p_du = du + (b_start + t).to(tl.int64)[:, None] * C + b_c[None, :]
            b_du = tl.load(p_du, mask=m_du[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
            b_d += b_w[None, :] * b_du
        if dtail is not None:
            m_tail = m_s & (b_length <= i)
            p_tail = dtail + (b_s.to(tl.int64) * (W - 1) + (i - b_length))[:, None] * C + b_c[None, :]
            b_d += tl.load(p_tail, mask=m_tail[:, None] & m_c[None, :], other=0.0).to(tl.float32)  # [BS, BC]
        p_d = dinitial_tail + (b_s.to(tl.int64) * (W - 1) + i)[:, None] * C + b_c[None, :]
        tl.store(p_d, b_d.to(dinitial_tail.dtype.element_ty), mask=m_s[:, None] & m_c[None, :])


def _row_tiles(channels, unit_length_heads=None, elements=TILE_ELEMENTS):
    """Tiles of one head's channels, or of up to 128."""
    width = channels // unit_length_heads if unit_length_heads else min(128, max(16, triton.next_power_of_2(channels)))
    return dict(BT=elements // width, BC=width, num_warps=4)


def _row_arguments(x, weight, initial_tail, plan, gather, unit_length_heads, eps, elements):
    """What the two kernels that convolve row by row share."""
    channels, width = weight.shape
    return dict(
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
        **_row_tiles(channels, unit_length_heads, elements),
    )


def _segment_arguments(plan, channels, width):
    """Grid, and what the two kernels that run over segments share."""
    grid = (triton.cdiv(plan.num_segments, 16), triton.cdiv(channels, 128))
    segments = dict(cu_seqlens=plan.cu_seqlens, num_segments=plan.num_segments)
    return grid, dict(segments, C=channels, W=width, BS=16, BC=128, num_warps=4)


class SegmentConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, initial_tail, plan, gather, unit_length_heads, output_tail, eps):
        (channels, width), rows = weight.shape, plan.num_rows
        arguments = _row_arguments(x, weight, initial_tail, plan, gather, unit_length_heads, eps, TILE_ELEMENTS)
        y = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
        _forward_kernel[(triton.cdiv(rows, arguments["BT"]), triton.cdiv(channels, arguments["BC"]))](y=y, **arguments)
        tail = None
        if output_tail:
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
        ctx.save_for_backward(x, weight, initial_tail)
        ctx.options = plan, gather, unit_length_heads, eps
        ctx.set_materialize_grads(False)
        return y, tail

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtail):
        x, weight, initial_tail = ctx.saved_tensors
        plan, gather, unit_length_heads, eps = ctx.options
        (channels, width), rows = weight.shape, plan.num_rows
        if dy is None:
            dy = x.new_zeros(rows, channels)
        if dy.stride(1) != 1:
            dy = dy.contiguous()
        if dtail is not None:
            dtail = dtail.contiguous()

        arguments = _row_arguments(
            x, weight, initial_tail, plan, gather, unit_length_heads, eps, GRADIENT_TILE_ELEMENTS
        )
        row_blocks, column_blocks = triton.cdiv(rows, arguments["BT"]), triton.cdiv(channels, arguments["BC"])
        blocks = triton.next_power_of_2(max(1, triton.cdiv(row_blocks * column_blocks, GRADIENT_PROGRAMS)))
        programs = triton.cdiv(row_blocks, blocks)
        du = torch.empty(rows, channels, dtype=x.dtype, device=x.device)
        dweight = torch.empty(programs, width, channels, dtype=torch.float32, device=x.device)
        _backward_output_kernel[(programs, column_blocks)](
            dy=dy,
            du=du,
            dweight=dweight,
            stride_dy=dy.stride(0),
            BLOCKS=blocks,
            **arguments,
        )
        dweight = dweight.sum(0).t().to(weight.dtype).contiguous()

        dx = dinitial_tail = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            tiles = _row_tiles(channels)
            _backward_input_kernel[(triton.cdiv(x.shape[0], tiles["BT"]), triton.cdiv(channels, tiles["BC"]))](
                du=du,
                weight=weight,
                dtail=dtail,
                dx=dx,
                row_of_slot=plan.row_of_slot if gather else None,
                segment_of_row=plan.segment_of_row,
                cu_seqlens=plan.cu_seqlens,
                num_outputs=x.shape[0],
                C=channels,
                W=width,
                SLOTS=plan.row_of_slot.shape[1] if gather else 1,
                **tiles,
            )
        if ctx.needs_input_grad[2]:
            dinitial_tail = torch.empty_like(initial_tail)
            grid, segments = _segment_arguments(plan, channels, width)
            _backward_initial_tail_kernel[grid](
                du=du, weight=weight, dtail=dtail, dinitial_tail=dinitial_tail, **segments
            )
        return dx, dweight, dinitial_tail, None, None, None, None, None


def _check(x, weight, plan, gather, unit_length_heads, initial_tail):
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
    _check(x, weight, plan, gather, unit_length_heads, initial_tail)
    if initial_tail is not None:
        initial_tail = initial_tail.contiguous()
    return SegmentConvolution.apply(
        x, weight.contiguous(), initial_tail, plan, gather, unit_length_heads, output_tail, eps
    )
