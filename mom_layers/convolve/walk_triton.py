"""Triton kernels of the convolution over segments, with SiLU and unit length, forward and backward.

A program is one warp that walks along a run of rows with one head's channels, or up to 256, and keeps in registers
what the coming rows need: the W - 1 inputs before the row at hand, and in the backward pass the unfinished gradients
of those inputs. Every input is loaded once. Only at a segment's first row are they replaced, so that rows inside a
segment, nearly all, take no branch: AHEAD of them at a time, in code that the compiler is free to interleave. Several
convolutions over the same rows are one launch. Nothing needs atomics.

SiLU is in terms of tanh, one instruction where the type allows: with h = u / 2 and t = tanh(h),
    SiLU(u) = h + h t = y,      2 dy/du = 2 - (1 - t) (1 - y).
The taps are halved when they are loaded, which pays for u / 2 and for the factor 2 of du in the inputs' gradients.

Shape legend: R rows, N tokens, C channels, S segments, W taps. Vectors are BC channels. Tap j multiplies the input j
rows earlier by weight[:, W - 1 - j]. Strides are compile-time constants, so that a slice of a wider tensor is still
read in vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mom_layers.common.activations_triton import tanh


@triton.jit
def _load(p_x, m_c):
    """[BC] at p_x; m_c is None where all channels exist, which saves an instruction for each."""
    if m_c is None:
        return tl.load(p_x)
    else:
        return tl.load(p_x, mask=m_c, other=0.0)


@triton.jit
def _store(p_x, b_x, needed, m_c):
    """needed is None for a row that is always written."""
    b_x = b_x.to(p_x.dtype.element_ty)
    if needed is None:
        tl.store(p_x, b_x, mask=m_c)
    elif m_c is None:
        tl.store(p_x, b_x, mask=needed)
    else:
        tl.store(p_x, b_x, mask=needed & m_c)


@triton.jit
def _half_taps(weight, b_c, m_c, W: tl.constexpr):
    """Tap j's [BC] weights divided by two, for every j."""
    b_w = ()
    for j in tl.static_range(W):
        b_w = b_w + (0.5 * _load(weight + b_c * W + (W - 1 - j), m_c).to(tl.float32),)
    return b_w


@triton.jit
def _source(token_of_row, i_row, num_rows):
    """Where row i_row's input is; the last row's past the end, whose loads nobody uses."""
    i_from = tl.minimum(i_row, num_rows - 1)
    if token_of_row is not None:
        i_from = tl.load(token_of_row + i_from)
    return i_from


@triton.jit
def _sources(token_of_row, i_first, num_rows, AHEAD: tl.constexpr):
    i_from = ()
    for n in tl.static_range(AHEAD):
        i_from = i_from + (_source(token_of_row, i_first + n, num_rows),)
    return i_from


@triton.jit
def _rows(x, stride_x: tl.constexpr, i_from, b_c, m_c):
    """Inputs [BC] of the rows i_from."""
    b_rows = ()
    for n in tl.static_range(len(i_from)):
        b_rows = b_rows + (_load(x + i_from[n].to(tl.int64) * stride_x + b_c, m_c),)
    return b_rows


@triton.jit
def _tail_row(initial_tail, i_segment, i_entry, needed, b_c, m_c, C: tl.constexpr, W: tl.constexpr):
    """[BC] float32 entry of a segment's tail, zero where it is not needed."""
    p_tail = initial_tail + (i_segment.to(tl.int64) * (W - 1) + i_entry) * C + b_c
    mask = needed if m_c is None else needed & m_c
    return tl.load(p_tail, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _inputs_before(
    x, stride_x: tl.constexpr, initial_tail, token_of_row, i_row, i_position, i_segment, b_c, m_c, C: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """W - 1 float32 [BC]: the inputs 1, 2, ... rows before i_row, at i_position of its segment; before the segment's
    first row its initial tail, or zero."""
    b_inputs = ()
    for j in tl.static_range(1, W):
        inside = i_position >= j
        i_from = i_row - j
        if token_of_row is not None:
            i_from = tl.load(token_of_row + i_from, mask=inside, other=0)
        mask = inside if m_c is None else inside & m_c
        b_x = tl.load(x + i_from.to(tl.int64) * stride_x + b_c, mask=mask, other=0.0).to(tl.float32)
        if initial_tail is not None:
            b_x += _tail_row(initial_tail, i_segment, W - 1 + i_position - j, i_position < j, b_c, m_c, C, W)
        b_inputs = b_inputs + (b_x,)
    return b_inputs


@triton.jit
def _zeros(COUNT: tl.constexpr, BC: tl.constexpr):
    b_zeros = ()
    for _ in tl.static_range(COUNT):
        b_zeros = b_zeros + (tl.zeros([BC], tl.float32),)
    return b_zeros


@triton.jit
def _inputs_before_segment(
    initial_tail, i_segment, exists, b_c, m_c, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr
):
    """:func:`_inputs_before` of a segment's first row."""
    if initial_tail is None:
        return _zeros(W - 1, BC)
    else:
        b_inputs = ()
        for j in tl.static_range(1, W):
            b_inputs = b_inputs + (_tail_row(initial_tail, i_segment, W - 1 - j, exists, b_c, m_c, C, W),)
        return b_inputs


@triton.jit
def _silu(b_w, b_inputs, W: tl.constexpr, dtype: tl.constexpr):
    """t = tanh(u / 2) and y = SiLU(u), [BC], of the sum u over the taps."""
    b_h = b_w[0] * b_inputs[0]
    for j in tl.static_range(1, W):
        b_h += b_w[j] * b_inputs[j]
    b_t = tanh(b_h, dtype)
    return b_t, b_h + b_h * b_t


@triton.jit
def _forward_row(
    b_x, b_window, b_w, y, i_row, eps, b_c, m_c, C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr
):
    """Writes row i_row's output; returns the inputs before the next row."""
    b_inputs = (b_x.to(tl.float32),) + b_window
    _, b_y = _silu(b_w, b_inputs, W, y.dtype.element_ty)
    if UNIT_LENGTH:
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=0) + eps)
    _store(y + i_row.to(tl.int64) * C + b_c, b_y, None, m_c)
    return b_inputs[: W - 1]


@triton.jit
def _forward_walk(
    x, weight, initial_tail, y, token_of_row, segment_of_row, cu_seqlens, num_rows, eps, i_run, i_block,
    stride_x: tl.constexpr, C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, RUN: tl.constexpr,
    AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    b_c = i_block * BC + tl.arange(0, BC)
    m_c = None if C % BC == 0 else b_c < C
    b_w = _half_taps(weight, b_c, m_c, W)
    i_first = i_run * RUN
    i_last = tl.minimum(i_first + RUN, num_rows)
    i_segment = tl.load(segment_of_row + i_first)
    i_position = i_first - tl.load(cu_seqlens + i_segment)
    i_end = tl.load(cu_seqlens + i_segment + 1)
    b_window = _inputs_before(x, stride_x, initial_tail, token_of_row, i_first, i_position, i_segment, b_c, m_c, C, W)
    b_rows = _rows(x, stride_x, _sources(token_of_row, i_first, num_rows, AHEAD), b_c, m_c)
    i_from = _sources(token_of_row, i_first + AHEAD, num_rows, AHEAD)
    for i_group in range(0, i_last - i_first, AHEAD):
        i = i_first + i_group
        b_next = _rows(x, stride_x, i_from, b_c, m_c)
        i_from = _sources(token_of_row, i + 2 * AHEAD, num_rows, AHEAD)
        if i + AHEAD <= i_end:
            for n in tl.static_range(AHEAD):
                b_window = _forward_row(b_rows[n], b_window, b_w, y, i + n, eps, b_c, m_c, C, W, UNIT_LENGTH)
        else:
            for n in range(0, tl.minimum(AHEAD, i_last - i)):
                i_row = i + n
                if i_row == i_end:
                    i_segment = tl.load(segment_of_row + i_row)
                    i_end = tl.load(cu_seqlens + i_segment + 1)
                    b_window = _inputs_before_segment(initial_tail, i_segment, i_row >= 0, b_c, m_c, C, W, BC)
                b_x = _load(x + _source(token_of_row, i_row, num_rows).to(tl.int64) * stride_x + b_c, m_c)
                b_window = _forward_row(b_x, b_window, b_w, y, i_row, eps, b_c, m_c, C, W, UNIT_LENGTH)
        b_rows = b_next


@triton.jit
def _copy_columns(source, target, i_run, num_rows, stride_source: tl.constexpr, stride_target: tl.constexpr,
                  COLUMNS: tl.constexpr, RUN: tl.constexpr, BG: tl.constexpr):  # fmt: skip
    """RUN rows of a few columns, which would not be worth a launch."""
    b_r = (i_run * RUN + tl.arange(0, RUN)).to(tl.int64)
    b_g = tl.arange(0, BG)
    mask = (b_r < num_rows)[:, None] & (b_g < COLUMNS)[None, :]
    b_x = tl.load(source + b_r[:, None] * stride_source + b_g[None, :], mask=mask)
    tl.store(target + b_r[:, None] * stride_target + b_g[None, :], b_x, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x, weight, initial_tail, y, token_of_row, segment_of_row, cu_seqlens, copied, copy, num_rows, eps,
    STRIDE_X: tl.constexpr, C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, BC: tl.constexpr,
    FIRST: tl.constexpr, STRIDE_COPIED: tl.constexpr, COLUMNS: tl.constexpr, BG: tl.constexpr,
    RUN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Tuples of one item for each convolution; its blocks of channels are FIRST[n] up to FIRST[n + 1] of the grid's
    second axis, and the copied columns are the block after them."""
    i_block = tl.program_id(1)
    for n in tl.static_range(len(x)):
        if (i_block >= FIRST[n]) & (i_block < FIRST[n + 1]):
            _forward_walk(
                x[n], weight[n], initial_tail[n], y[n], token_of_row[n], segment_of_row, cu_seqlens, num_rows, eps,
                tl.program_id(0), i_block - FIRST[n], STRIDE_X[n], C[n], W, UNIT_LENGTH[n], RUN, AHEAD, BC[n],
            )  # fmt: skip
    if copied is not None:
        if i_block == FIRST[len(x)]:
            _copy_columns(copied, copy, tl.program_id(0), num_rows, STRIDE_COPIED, COLUMNS, COLUMNS, RUN, BG)


@triton.jit
def _backward_row(
    b_x, b_dy, b_window, b_w, eps, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """Twice the gradient before SiLU, and the inputs of all taps."""
    b_inputs = (b_x.to(tl.float32),) + b_window
    b_t, b_y = _silu(b_w, b_inputs, W, dtype)
    b_dy = b_dy.to(tl.float32)
    if UNIT_LENGTH:
        scale = tl.rsqrt(tl.sum(b_y * b_y, axis=0) + eps)
        along = tl.sum(b_dy * b_y, axis=0) * scale * scale * scale
        b_dy = b_dy * scale - b_y * along
    b_rest = b_dy - b_dy * b_y
    return 2.0 * b_dy - (b_rest - b_rest * b_t), b_inputs


@triton.jit
def _add_row(b_sums, b_du, b_w, W: tl.constexpr):
    """The unfinished gradients of the inputs before the next row, and the finished one W - 1 rows before this."""
    b_new = (b_w[0] * b_du,)
    for j in tl.static_range(1, W):
        b_new = b_new + (b_sums[j - 1] + b_w[j] * b_du,)
    return b_new[: W - 1], b_new[W - 1]


@triton.jit
def _add_products(b_dw, b_du, b_inputs, W: tl.constexpr):
    b_new = ()
    for j in tl.static_range(W):
        b_new = b_new + (b_dw[j] + b_du * b_inputs[j],)
    return b_new


@triton.jit
def _backward_walk(
    x, weight, initial_tail, dy, dtail, dx, du, dweight_parts, token_of_row, segment_of_row, cu_seqlens, num_rows, eps,
    i_run, i_block, stride_x: tl.constexpr, stride_dy: tl.constexpr, stride_dx: tl.constexpr,
    stride_parts: tl.constexpr, C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, RUN: tl.constexpr,
    AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of the run's rows (not yet summed over a token's rows), its share [W, C] of the weight's gradient, and du, the
    gradient before SiLU, where somebody asks for it. Walks W - 1 rows into the next run, which read the run's last."""
    dtype: tl.constexpr = dx.dtype.element_ty
    b_c = i_block * BC + tl.arange(0, BC)
    m_c = None if C % BC == 0 else b_c < C
    b_w = _half_taps(weight, b_c, m_c, W)
    i_first = i_run * RUN
    i_last = tl.minimum(i_first + RUN, num_rows)
    i_segment = tl.load(segment_of_row + i_first)
    i_position = i_first - tl.load(cu_seqlens + i_segment)
    i_end = tl.load(cu_seqlens + i_segment + 1)
    i_open = i_first  # no earlier row's gradient is this run's, and unfinished
    b_window = _inputs_before(x, stride_x, initial_tail, token_of_row, i_first, i_position, i_segment, b_c, m_c, C, W)
    b_sums = _zeros(W - 1, BC)
    b_dw = _zeros(W, BC)
    b_rows = _rows(x, stride_x, _sources(token_of_row, i_first, num_rows, AHEAD), b_c, m_c)
    b_dys = _rows(dy, stride_dy, _sources(None, i_first, num_rows, AHEAD), b_c, m_c)
    i_from = _sources(token_of_row, i_first + AHEAD, num_rows, AHEAD)
    for i_group in range(0, i_last - i_first + W - 1, AHEAD):
        i = i_first + i_group
        b_next = _rows(x, stride_x, i_from, b_c, m_c)
        b_next_dys = _rows(dy, stride_dy, _sources(None, i + AHEAD, num_rows, AHEAD), b_c, m_c)
        i_from = _sources(token_of_row, i + 2 * AHEAD, num_rows, AHEAD)
        if i + AHEAD <= tl.minimum(i_end, i_last):
            for n in tl.static_range(AHEAD):
                b_du, b_inputs = _backward_row(b_rows[n], b_dys[n], b_window, b_w, eps, W, UNIT_LENGTH, dtype)
                b_window = b_inputs[: W - 1]
                b_dw = _add_products(b_dw, b_du, b_inputs, W)
                if du is not None:
                    _store(du + (i + n).to(tl.int64) * C + b_c, 0.5 * b_du, None, m_c)
                b_sums, b_dx = _add_row(b_sums, b_du, b_w, W)
                i_done = i + n - (W - 1)
                _store(dx + i_done.to(tl.int64) * stride_dx + b_c, b_dx, i_done >= i_open, m_c)
        else:
            for n in range(0, tl.minimum(AHEAD, i_last + W - 1 - i)):
                i_row = i + n
                exists = i_row < num_rows
                if i_row == i_end:
                    for j in tl.static_range(1, W):
                        i_done = i_row - j
                        mine = (i_done >= i_open) & (i_done < i_last)
                        b_dx = b_sums[j - 1]
                        if dtail is not None:
                            b_dx += _tail_row(dtail, i_segment, W - 1 - j, mine, b_c, m_c, C, W)
                        _store(dx + i_done.to(tl.int64) * stride_dx + b_c, b_dx, mine, m_c)
                    i_open = i_row
                    i_segment = tl.load(segment_of_row + i_row, mask=exists, other=0)
                    i_end = tl.load(cu_seqlens + i_segment + 1, mask=exists, other=-1)
                    b_window = _inputs_before_segment(initial_tail, i_segment, exists, b_c, m_c, C, W, BC)
                i_at = tl.minimum(i_row, num_rows - 1).to(tl.int64)
                b_x = _load(x + _source(token_of_row, i_row, num_rows).to(tl.int64) * stride_x + b_c, m_c)
                b_dy = _load(dy + i_at * stride_dy + b_c, m_c)
                b_du, b_inputs = _backward_row(b_x, b_dy, b_window, b_w, eps, W, UNIT_LENGTH, dtype)
                b_window = b_inputs[: W - 1]
                mine = i_row < i_last
                b_dw = _add_products(b_dw, tl.where(mine, b_du, 0.0), b_inputs, W)
                if du is not None:
                    _store(du + i_row.to(tl.int64) * C + b_c, 0.5 * b_du, mine, m_c)
                b_sums, b_dx = _add_row(b_sums, b_du, b_w, W)
                i_done = i_row - (W - 1)
                mine = (i_done >= i_open) & (i_done < i_last)
                _store(dx + i_done.to(tl.int64) * stride_dx + b_c, b_dx, mine, m_c)
        b_rows = b_next
        b_dys = b_next_dys
    for j in tl.static_range(W):
        p_parts = dweight_parts + (i_run * W + W - 1 - j).to(tl.int64) * stride_parts + b_c
        _store(p_parts, 0.5 * b_dw[j], None, m_c)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x, weight, initial_tail, dy, dtail, dx, du, dweight_parts, token_of_row, segment_of_row, cu_seqlens, copied, copy,
    num_rows, eps, STRIDE_X: tl.constexpr, STRIDE_DY: tl.constexpr, STRIDE_DX: tl.constexpr,
    STRIDE_PARTS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, UNIT_LENGTH: tl.constexpr, BC: tl.constexpr,
    FIRST: tl.constexpr, STRIDE_COPY: tl.constexpr, COLUMNS: tl.constexpr, BG: tl.constexpr,
    RUN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """The tuples of :func:`_forward_kernel`; the copied columns go the other way."""
    i_block = tl.program_id(1)
    for n in tl.static_range(len(x)):
        if (i_block >= FIRST[n]) & (i_block < FIRST[n + 1]):
            _backward_walk(
                x[n], weight[n], initial_tail[n], dy[n], dtail[n], dx[n], du[n], dweight_parts[n], token_of_row[n],
                segment_of_row, cu_seqlens, num_rows, eps, tl.program_id(0), i_block - FIRST[n],
                STRIDE_X[n], STRIDE_DY[n], STRIDE_DX[n], STRIDE_PARTS, C[n], W, UNIT_LENGTH[n], RUN, AHEAD, BC[n],
            )  # fmt: skip
    if copied is not None:
        if i_block == FIRST[len(x)]:
            _copy_columns(copied, copy, tl.program_id(0), num_rows, COLUMNS, STRIDE_COPY, COLUMNS, RUN, BG)
