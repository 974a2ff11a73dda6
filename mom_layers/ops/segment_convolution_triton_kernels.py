"""Triton kernels of the convolution over segments, with SiLU and unit length, forward and backward.

A program is one warp that walks along a run of rows with one head's channels, or up to 256, and keeps in registers the
W inputs that a tap may still read: every input is loaded once. The backward walk goes against time, so that the inputs'
gradients are complete once the W outputs that read them are known; those past the end of its run it computes again.
Nothing needs atomics.

Shape legend: R rows, N tokens, C channels, H heads, S segments, W taps. Vectors are BC channels. Tap j multiplies the
input j rows earlier by weight[:, W - 1 - j]. Strides are compile-time constants, so that a slice of a wider tensor is
still read in vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mom_layers.ops.activations_triton import sigmoid


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
def _row_of(x, stride_x: tl.constexpr, token_of_row, i_row, inside, b_c, m_c):
    """[BC] float32 input of row i_row, zero where it is not inside."""
    i_from = i_row
    if token_of_row is not None:
        i_from = tl.load(token_of_row + i_row, mask=inside, other=0)
    p_x = x + i_from.to(tl.int64) * stride_x + b_c
    return tl.load(p_x, mask=inside & m_c, other=0.0)


@triton.jit
def _rows_on(
    x, stride_x: tl.constexpr, token_of_row, position_of_row, i_first, num_rows, b_c, m_c, AHEAD: tl.constexpr
):
    """The inputs [BC] of the AHEAD rows from i_first on, and their positions in their segments (0 past the last)."""
    b_rows = ()
    i_positions = ()
    for n in tl.static_range(AHEAD):
        inside = i_first + n < num_rows
        b_rows = b_rows + (_row_of(x, stride_x, token_of_row, i_first + n, inside, b_c, m_c),)
        i_positions = i_positions + (tl.load(position_of_row + i_first + n, mask=inside, other=0),)
    return b_rows, i_positions


@triton.jit
def _rows_back(
    x, stride_x: tl.constexpr, dy, stride_dy: tl.constexpr, token_of_row, position_of_row, i_first, num_rows, b_c, m_c,
    W: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """For the AHEAD rows from i_first back: the oldest input that each reads, dy, and their positions (0 outside)."""
    b_rows = ()
    b_dys = ()
    i_positions = ()
    for n in tl.static_range(AHEAD):
        i_row = i_first - n
        i_oldest = i_row - (W - 1)
        exists = (i_row >= 0) & (i_row < num_rows)
        inside = (i_oldest >= 0) & (i_oldest < num_rows)
        b_rows = b_rows + (_row_of(x, stride_x, token_of_row, i_oldest, inside, b_c, m_c),)
        b_dys = b_dys + (tl.load(dy + i_row.to(tl.int64) * stride_dy + b_c, mask=exists & m_c, other=0.0),)
        i_positions = i_positions + (tl.load(position_of_row + i_row, mask=exists, other=0),)
    return b_rows, b_dys, i_positions


@triton.jit
def _tail_row(initial_tail, i_segment, i_entry, needed, b_c, m_c, C: tl.constexpr, W: tl.constexpr):
    """[BC] float32 entry of a segment's initial tail, zero where it is not needed."""
    p_tail = initial_tail + (i_segment.to(tl.int64) * (W - 1) + i_entry) * C + b_c
    return tl.load(p_tail, mask=needed & m_c, other=0.0).to(tl.float32)


@triton.jit
def _taps(weight, b_c, m_c, W: tl.constexpr):
    """Tap j's [BC] weights, for every j."""
    b_w = ()
    for j in tl.static_range(W):
        b_w = b_w + (tl.load(weight + b_c * W + (W - 1 - j), mask=m_c, other=0.0).to(tl.float32),)
    return b_w


@triton.jit
def _add_taps(b_sum, b_w, b_rows, i_position, W: tl.constexpr):
    """b_sum and the products of taps 1, 2, ... with their rows, as far as the segment has them.

    In branches for all channels, where a choice would cost an instruction for each; mostly one branch.
    """
    if i_position >= W - 1:
        for j in tl.static_range(1, W):
            b_sum += b_w[j] * b_rows[j]
    else:
        for j in tl.static_range(1, W):
            if i_position >= j:
                b_sum += b_w[j] * b_rows[j]
    return b_sum


@triton.jit
def _add_products(b_sums, b_du, b_rows, i_position, W: tl.constexpr):
    """Every tap's sum and the product of du with the tap's row, as far as the segment has it; none at position -1."""
    if i_position >= W - 1:
        b_new = ()
        for j in tl.static_range(W):
            b_new = b_new + (b_sums[j] + b_du * b_rows[j],)
    else:
        b_new = ()
        for j in tl.static_range(W):
            b_sum = b_sums[j]
            if i_position >= j:
                b_sum += b_du * b_rows[j]
            b_new = b_new + (b_sum,)
    return b_new


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x, weight, initial_tail, y, token_of_row, position_of_row, segment_of_row, num_rows, eps, stride_x: tl.constexpr,
    C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    i_first = tl.program_id(0) * RUN
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_w = _taps(weight, b_c, m_c, W)
    b_earlier = ()  # inputs 1, 2, ... rows before the row at hand, whatever their segment
    for j in tl.static_range(1, W):
        inside = (i_first >= j) & (i_first - j < num_rows)
        b_earlier = b_earlier + (_row_of(x, stride_x, token_of_row, i_first - j, inside, b_c, m_c).to(tl.float32),)
    b_new, i_positions = _rows_on(x, stride_x, token_of_row, position_of_row, i_first, num_rows, b_c, m_c, AHEAD)
    for i in range(0, RUN, AHEAD):
        b_next, i_next_positions = _rows_on(
            x, stride_x, token_of_row, position_of_row, i_first + i + AHEAD, num_rows, b_c, m_c, AHEAD
        )
        for n in tl.static_range(AHEAD):
            i_row = i_first + i + n
            i_position = i_positions[n]
            b_inputs = (b_new[n].to(tl.float32),) + b_earlier
            b_u = b_w[0] * b_inputs[0]
            if initial_tail is not None:
                i_segment = tl.load(segment_of_row + i_row, mask=i_row < num_rows, other=0)
            b_u = _add_taps(b_u, b_w, b_inputs, i_position, W)
            if initial_tail is not None:
                for j in tl.static_range(1, W):
                    needed = (i_position < j) & (i_row < num_rows)
                    b_u += b_w[j] * _tail_row(initial_tail, i_segment, W - 1 + i_position - j, needed, b_c, m_c, C, W)
            b_earlier = ()
            for j in tl.static_range(W - 1):
                b_earlier = b_earlier + (b_inputs[j],)
            b_y = b_u * sigmoid(b_u)
            if UNIT_LENGTH:
                b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=0) + eps)
            tl.store(y + i_row.to(tl.int64) * C + b_c, b_y.to(y.dtype.element_ty), mask=(i_row < num_rows) & m_c)
        b_new = b_next
        i_positions = i_next_positions


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
def _backward_kernel(
    x, weight, initial_tail, dy, dtail, dx, du, dweight_parts, token_of_row, position_of_row, segment_of_row,
    cu_seqlens, num_rows, eps, stride_x: tl.constexpr, stride_dy: tl.constexpr, stride_dx: tl.constexpr,
    stride_parts: tl.constexpr, C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, RUN: tl.constexpr,
    AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of every row (not yet summed over a token's rows), this run's share [W, C] of the weight's gradient, and du,
    the gradient before SiLU, where somebody asks for it."""
    STEPS: tl.constexpr = (RUN + W - 1 + AHEAD - 1) // AHEAD * AHEAD
    i_run = tl.program_id(0)
    i_top = i_run * RUN + RUN + W - 2
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_w = _taps(weight, b_c, m_c, W)
    b_dw = ()
    for _ in tl.static_range(W):
        b_dw = b_dw + (tl.zeros([BC], tl.float32),)
    b_window = ()  # inputs of the row at hand and of those before it, whatever their segment
    b_later = ()  # du of the rows after it, of which i_after belong to its segment
    i_after = i_run * 0
    for j in tl.static_range(W - 1):
        i_row = i_top - j
        inside = (i_row >= 0) & (i_row < num_rows)
        b_window = b_window + (_row_of(x, stride_x, token_of_row, i_row, inside, b_c, m_c).to(tl.float32),)
        b_later = b_later + (tl.zeros([BC], tl.float32),)
    b_new, b_new_dy, i_positions = _rows_back(
        x, stride_x, dy, stride_dy, token_of_row, position_of_row, i_top, num_rows, b_c, m_c, W, AHEAD
    )
    for i in range(0, STEPS, AHEAD):
        b_next, b_next_dy, i_next_positions = _rows_back(
            x, stride_x, dy, stride_dy, token_of_row, position_of_row, i_top - i - AHEAD, num_rows, b_c, m_c, W, AHEAD
        )
        for n in tl.static_range(AHEAD):
            i_row = i_top - i - n
            exists = (i_row >= 0) & (i_row < num_rows)
            mine = exists & (i_row >= i_run * RUN) & (i_row < i_run * RUN + RUN)
            i_position = i_positions[n]
            i_segment = tl.load(segment_of_row + i_row, mask=exists, other=0)
            b_inputs = b_window + (b_new[n].to(tl.float32),)
            b_u = b_w[0] * b_inputs[0]
            b_u = _add_taps(b_u, b_w, b_inputs, i_position, W)
            if initial_tail is not None:
                for j in tl.static_range(1, W):
                    needed = exists & (i_position < j)
                    b_u += b_w[j] * _tail_row(initial_tail, i_segment, W - 1 + i_position - j, needed, b_c, m_c, C, W)
            b_dy = b_new_dy[n].to(tl.float32)
            b_sigmoid = sigmoid(b_u)
            b_y = b_u * b_sigmoid
            if UNIT_LENGTH:
                scale = tl.rsqrt(tl.sum(b_y * b_y, axis=0) + eps)
                along = tl.sum(b_dy * b_y, axis=0) * scale * scale
                b_dy = (b_dy - b_y * along) * scale
            b_du = b_dy * (b_sigmoid + b_y * (1.0 - b_sigmoid))
            b_dx = _add_taps(b_w[0] * b_du, b_w, (b_du,) + b_later, i_after, W)
            if dtail is not None:
                i_left = tl.load(cu_seqlens + i_segment + 1, mask=exists, other=0) - 1 - i_row
                b_dx += _tail_row(dtail, i_segment, W - 2 - i_left, mine & (i_left < W - 1), b_c, m_c, C, W)
            tl.store(dx + i_row.to(tl.int64) * stride_dx + b_c, b_dx.to(dx.dtype.element_ty), mask=mine & m_c)
            if du is not None:
                tl.store(du + i_row.to(tl.int64) * C + b_c, b_du.to(du.dtype.element_ty), mask=mine & m_c)
            b_dw = _add_products(b_dw, b_du, b_inputs, tl.where(mine, i_position, -1), W)
            if initial_tail is not None:
                b_sums = (b_dw[0],)
                for j in tl.static_range(1, W):
                    needed = mine & (i_position < j)
                    b_tail = _tail_row(initial_tail, i_segment, W - 1 + i_position - j, needed, b_c, m_c, C, W)
                    b_sums = b_sums + (b_dw[j] + b_du * b_tail,)
                b_dw = b_sums
            # One row earlier.
            b_moved = ()
            b_shifted = (b_du,)
            for j in tl.static_range(1, W):
                b_moved = b_moved + (b_inputs[j],)
                if j < W - 1:
                    b_shifted = b_shifted + (b_later[j - 1],)
            b_window = b_moved
            b_later = b_shifted
            i_after = tl.where(i_position > 0, i_after + 1, 0)
        b_new = b_next
        b_new_dy = b_next_dy
        i_positions = i_next_positions
    for j in tl.static_range(W):
        tl.store(dweight_parts + (i_run * W + W - 1 - j).to(tl.int64) * stride_parts + b_c, b_dw[j], mask=m_c)


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
