"""Triton kernels of the convolution over segments, with SiLU and unit length, forward and backward.

A program is one warp that walks along a run of rows with one head's channels, or up to 256, and keeps in registers what
the next rows need: the W - 1 inputs before the present row, and in the backward pass the unfinished gradients of those
inputs. A program loads every input once, and replaces what it keeps only at a segment's first row. Inside a segment,
where nearly all rows lie, AHEAD rows at a time run without a branch, in code that the compiler can interleave. Several
convolutions over the same rows are one launch. No kernel needs atomics.

SiLU is computed by tanh, one instruction where the type allows it: with h = u / 2 and t = tanh(h),
    SiLU(u) = h + h t = y,      2 dy/du = 2 - (1 - t) (1 - y).
The taps are divided by two when they are loaded, so that the sum over the taps is h and not u. The factor 2 that
_backward_row leaves in du cancels with the halved taps in the inputs' gradients.

Shape legend: R rows, N tokens, C channels, S segments, W taps. Vectors are BC channels. Tap j multiplies the input j
rows earlier by weight[:, W - 1 - j]. Strides are compile-time constants, so that a slice of a wider tensor is read in
vectors too.
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
    """Stores b_x [BC] in the pointer's type where ``needed``, a scalar; None for a row that is always written."""
    b_x = b_x.to(p_x.dtype.element_ty)
    if needed is None:
        tl.store(p_x, b_x, mask=m_c)
    elif m_c is None:
        tl.store(p_x, b_x, mask=needed)
    else:
        tl.store(p_x, b_x, mask=needed & m_c)


@triton.jit
def _store_dx(dx, stride_dx: tl.constexpr, token_of_dx, i_row, b_dx, needed, b_c, m_c):
    """Stores an input's gradient [BC] where ``needed``: in row i_row, or in the row of its token."""
    i_at = i_row
    if token_of_dx is not None:
        i_at = tl.load(token_of_dx + i_row, mask=needed, other=0)
    _store(dx + i_at.to(tl.int64) * stride_dx + b_c, b_dx, needed, m_c)


@triton.jit
def _half_taps(weight, b_c, m_c, W: tl.constexpr):
    """Tap j's [BC] weights divided by two, for every j."""
    b_w = ()
    for j in tl.static_range(W):
        b_w = b_w + (0.5 * _load(weight + b_c * W + (W - 1 - j), m_c).to(tl.float32),)
    return b_w


@triton.jit
def _source(token_of_row, i_row, num_rows):
    """The index of row i_row's input in x. Past the end the last row's: its loads are valid, and no row uses them."""
    i_from = tl.minimum(i_row, num_rows - 1)
    if token_of_row is not None:
        i_from = tl.load(token_of_row + i_from)
    return i_from


@triton.jit
def _sources(token_of_row, i_first, num_rows, AHEAD: tl.constexpr):
    """The indices in x of the inputs of AHEAD rows from i_first on."""
    i_from = ()
    for n in tl.static_range(AHEAD):
        i_from = i_from + (_source(token_of_row, i_first + n, num_rows),)
    return i_from


@triton.jit
def _rows(x, stride_x: tl.constexpr, i_from, b_c, m_c):
    """x [BC] at every index of i_from."""
    b_rows = ()
    for n in tl.static_range(len(i_from)):
        b_rows = b_rows + (_load(x + i_from[n].to(tl.int64) * stride_x + b_c, m_c),)
    return b_rows


@triton.jit
def _tail_row(initial_tail, i_segment, i_entry, needed, b_c, m_c, C: tl.constexpr, W: tl.constexpr):
    """[BC] float32 entry i_entry of a segment's tail; zero where ``needed`` is false."""
    p_tail = initial_tail + (i_segment.to(tl.int64) * (W - 1) + i_entry) * C + b_c
    mask = needed if m_c is None else needed & m_c
    return tl.load(p_tail, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _inputs_before(
    x, stride_x: tl.constexpr, initial_tail, token_of_row, i_row, i_position, i_segment, b_c, m_c, C: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """W - 1 float32 [BC]: the inputs 1, 2, ... rows before row i_row, which is at i_position of its segment. Inputs
    before the segment's first row are its initial tail, or zero."""
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
    """COUNT vectors of zeros."""
    b_zeros = ()
    for _ in tl.static_range(COUNT):
        b_zeros = b_zeros + (tl.zeros([BC], tl.float32),)
    return b_zeros


@triton.jit
def _inputs_before_segment(
    initial_tail, i_segment, exists, b_c, m_c, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr
):
    """W - 1 float32 [BC]: the inputs before a segment's first row, its initial tail or zero."""
    if initial_tail is None:
        return _zeros(W - 1, BC)
    else:
        b_inputs = ()
        for j in tl.static_range(1, W):
            b_inputs = b_inputs + (_tail_row(initial_tail, i_segment, W - 1 - j, exists, b_c, m_c, C, W),)
        return b_inputs


@triton.jit
def _silu(b_w, b_inputs, W: tl.constexpr, SILU: tl.constexpr, dtype: tl.constexpr):
    """t = tanh(h) and y = SiLU(u) = h + h t, [BC], with h = u / 2 the sum over the halved taps. Without SiLU t = 1, so
    that y = u and dy/du = 1."""
    # h = u / 2, in float32 like all sums.
    b_h = b_w[0] * b_inputs[0]
    for j in tl.static_range(1, W):
        b_h += b_w[j] * b_inputs[j]
    b_t = tanh(b_h, dtype) if SILU else tl.full(b_h.shape, 1.0, tl.float32)
    return b_t, b_h + b_h * b_t


@triton.jit
def _forward_row(
    b_x, b_window, b_w, y, i_row, eps, b_c, m_c, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    UNIT_LENGTH: tl.constexpr,
):  # fmt: skip
    """Writes y = unit(SiLU(u)) of row i_row. Returns the inputs before the next row."""
    b_inputs = (b_x.to(tl.float32),) + b_window
    _, b_y = _silu(b_w, b_inputs, W, SILU, y.dtype.element_ty)
    if UNIT_LENGTH:
        b_y *= tl.rsqrt(tl.sum(b_y * b_y, axis=0) + eps)
    _store(y + i_row.to(tl.int64) * C + b_c, b_y, None, m_c)
    return b_inputs[: W - 1]


@triton.jit
def _forward_walk(
    x, weight, initial_tail, y, token_of_row, segment_of_row, cu_seqlens, num_rows, eps, i_run, i_block,
    stride_x: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, UNIT_LENGTH: tl.constexpr,
    RUN: tl.constexpr, AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y of the run's rows, for one block of channels."""
    b_c = i_block * BC + tl.arange(0, BC)
    m_c = None if C % BC == 0 else b_c < C
    b_w = _half_taps(weight, b_c, m_c, W)
    # The run's rows, and the segment of the first row.
    i_first = i_run * RUN
    i_last = tl.minimum(i_first + RUN, num_rows)
    i_segment = tl.load(segment_of_row + i_first)
    i_position = i_first - tl.load(cu_seqlens + i_segment)
    i_end = tl.load(cu_seqlens + i_segment + 1)
    b_window = _inputs_before(x, stride_x, initial_tail, token_of_row, i_first, i_position, i_segment, b_c, m_c, C, W)
    # The first AHEAD rows' inputs, and the indices for the next AHEAD rows.
    b_rows = _rows(x, stride_x, _sources(token_of_row, i_first, num_rows, AHEAD), b_c, m_c)
    i_from = _sources(token_of_row, i_first + AHEAD, num_rows, AHEAD)
    for i_step in range(0, i_last - i_first, AHEAD):
        i = i_first + i_step
        # Loads for the next AHEAD rows, and the indices for the AHEAD rows after the next.
        b_next = _rows(x, stride_x, i_from, b_c, m_c)
        i_from = _sources(token_of_row, i + 2 * AHEAD, num_rows, AHEAD)
        # y_t = unit(SiLU(sum_j weight[:, W - 1 - j] x_{t - j})): AHEAD rows of one segment, without a branch.
        if i + AHEAD <= i_end:
            for n in tl.static_range(AHEAD):
                b_window = _forward_row(b_rows[n], b_window, b_w, y, i + n, eps, b_c, m_c, C, W, SILU, UNIT_LENGTH)
        else:
            # The same, row by row: a segment ends among the rows, whose successor starts with its own tail.
            for n in range(0, tl.minimum(AHEAD, i_last - i)):
                i_row = i + n
                if i_row == i_end:
                    i_segment = tl.load(segment_of_row + i_row)
                    i_end = tl.load(cu_seqlens + i_segment + 1)
                    b_window = _inputs_before_segment(initial_tail, i_segment, i_row >= 0, b_c, m_c, C, W, BC)
                b_x = _load(x + _source(token_of_row, i_row, num_rows).to(tl.int64) * stride_x + b_c, m_c)
                b_window = _forward_row(b_x, b_window, b_w, y, i_row, eps, b_c, m_c, C, W, SILU, UNIT_LENGTH)
        b_rows = b_next


@triton.jit
def _copy_columns(
    source, target, token_of_source, token_of_target, i_run, i_block, num_rows, stride_source: tl.constexpr,
    stride_target: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Copies BG columns of RUN rows, too few numbers for a launch of their own; from or to the rows' tokens where their
    indices are given."""
    b_r = i_run * RUN + tl.arange(0, RUN)
    b_from = b_r.to(tl.int64)
    b_to = b_from
    if token_of_source is not None:
        b_from = tl.load(token_of_source + b_r, mask=b_r < num_rows, other=0).to(tl.int64)
    if token_of_target is not None:
        b_to = tl.load(token_of_target + b_r, mask=b_r < num_rows, other=0).to(tl.int64)
    b_g = i_block * BG + tl.arange(0, BG)
    mask = (b_r < num_rows)[:, None] & (b_g < COLUMNS)[None, :]
    b_x = tl.load(source + b_from[:, None] * stride_source + b_g[None, :], mask=mask)
    tl.store(target + b_to[:, None] * stride_target + b_g[None, :], b_x, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    x, weight, initial_tail, y, token_of_row, segment_of_row, cu_seqlens, copied, copy, token_of_copy, num_rows, eps,
    STRIDE_X: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, UNIT_LENGTH: tl.constexpr,
    BC: tl.constexpr, FIRST: tl.constexpr, STRIDE_COPIED: tl.constexpr, COLUMNS: tl.constexpr, BG: tl.constexpr,
    RUN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Tuples have one item for each convolution. Convolution n has the blocks of channels FIRST[n] up to FIRST[n + 1]
    of the grid's second axis. The blocks after all of them copy the columns of ``copied``, BG each."""
    i_block = tl.program_id(1)
    for n in tl.static_range(len(x)):
        if (i_block >= FIRST[n]) & (i_block < FIRST[n + 1]):
            _forward_walk(
                x[n], weight[n], initial_tail[n], y[n], token_of_row[n], segment_of_row, cu_seqlens, num_rows, eps,
                tl.program_id(0), i_block - FIRST[n], STRIDE_X[n], C[n], W, SILU[n], UNIT_LENGTH[n], RUN, AHEAD, BC[n],
            )  # fmt: skip
    if copied is not None:
        if i_block >= FIRST[len(x)]:
            _copy_columns(
                copied, copy, token_of_copy, None, tl.program_id(0), i_block - FIRST[len(x)], num_rows,
                STRIDE_COPIED, COLUMNS, COLUMNS, RUN, BG,
            )  # fmt: skip


@triton.jit
def _backward_row(
    b_x, b_dy, b_window, b_w, eps, W: tl.constexpr, SILU: tl.constexpr, UNIT_LENGTH: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """2 du, twice the gradient before SiLU, and the inputs of all taps."""
    b_inputs = (b_x.to(tl.float32),) + b_window
    b_t, b_y = _silu(b_w, b_inputs, W, SILU, dtype)
    b_dy = b_dy.to(tl.float32)
    # unit's gradient, with s = 1 / sqrt(|y|^2 + eps):  dy <- s dy - s^3 (dy . y) y
    if UNIT_LENGTH:
        scale = tl.rsqrt(tl.sum(b_y * b_y, axis=0) + eps)
        along = tl.sum(b_dy * b_y, axis=0) * scale * scale * scale
        b_dy = b_dy * scale - b_y * along
    # SiLU's gradient:  2 du = 2 dy - dy (1 - y) (1 - t)
    b_rest = b_dy - b_dy * b_y
    return 2.0 * b_dy - (b_rest - b_rest * b_t), b_inputs


@triton.jit
def _add_row(b_sums, b_du, b_w, W: tl.constexpr):
    """Adds a row's du to the gradients of its W inputs: dx_{t - j} += weight[:, W - 1 - j] du_t.

    Returns the unfinished gradients of the W - 1 inputs before the next row, and the gradient of the input W - 1 rows
    before this row, which is finished.
    """
    b_new = (b_w[0] * b_du,)
    for j in tl.static_range(1, W):
        b_new = b_new + (b_sums[j - 1] + b_w[j] * b_du,)
    return b_new[: W - 1], b_new[W - 1]


@triton.jit
def _add_products(b_dw, b_du, b_inputs, W: tl.constexpr):
    """Adds a row's products to the gradients of the taps: dw_j += du_t x_{t - j}."""
    b_new = ()
    for j in tl.static_range(W):
        b_new = b_new + (b_dw[j] + b_du * b_inputs[j],)
    return b_new


@triton.jit
def _backward_walk(
    x, weight, initial_tail, dy, dtail, dx, du, dweight_parts, token_of_row, token_of_dx, segment_of_row, cu_seqlens,
    num_rows, eps, i_run, i_block, stride_x: tl.constexpr, stride_dy: tl.constexpr, stride_dx: tl.constexpr,
    stride_parts: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr, UNIT_LENGTH: tl.constexpr,
    RUN: tl.constexpr, AHEAD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dx of the run's rows (before the sum over a token's rows; at the rows' tokens where ``token_of_dx`` is given, as
    a token has one row then), the run's share [W, C] of the weight's gradient, and
    du, the gradient before SiLU, unless it is None. The walk goes W - 1 rows into the next run, because these rows read
    the run's last inputs.
    """
    dtype: tl.constexpr = dx.dtype.element_ty
    b_c = i_block * BC + tl.arange(0, BC)
    m_c = None if C % BC == 0 else b_c < C
    b_w = _half_taps(weight, b_c, m_c, W)
    # The run's rows, the segment of the first row, and the first row whose dx is unfinished and in this run.
    i_first = i_run * RUN
    i_last = tl.minimum(i_first + RUN, num_rows)
    i_segment = tl.load(segment_of_row + i_first)
    i_position = i_first - tl.load(cu_seqlens + i_segment)
    i_end = tl.load(cu_seqlens + i_segment + 1)
    i_open = i_first
    b_window = _inputs_before(x, stride_x, initial_tail, token_of_row, i_first, i_position, i_segment, b_c, m_c, C, W)
    # Unfinished gradients of the W - 1 inputs before the present row, and dw of the taps.
    b_sums = _zeros(W - 1, BC)
    b_dw = _zeros(W, BC)
    # The first AHEAD rows' inputs and gradients, and the indices for the next AHEAD rows.
    b_rows = _rows(x, stride_x, _sources(token_of_row, i_first, num_rows, AHEAD), b_c, m_c)
    b_dys = _rows(dy, stride_dy, _sources(None, i_first, num_rows, AHEAD), b_c, m_c)
    i_from = _sources(token_of_row, i_first + AHEAD, num_rows, AHEAD)
    for i_step in range(0, i_last - i_first + W - 1, AHEAD):
        i = i_first + i_step
        # Loads for the next AHEAD rows, and the indices for the AHEAD rows after the next.
        b_next = _rows(x, stride_x, i_from, b_c, m_c)
        b_next_dys = _rows(dy, stride_dy, _sources(None, i + AHEAD, num_rows, AHEAD), b_c, m_c)
        i_from = _sources(token_of_row, i + 2 * AHEAD, num_rows, AHEAD)
        # du_t, dw_j += du_t x_{t - j}, dx_{t - j} += weight[:, W - 1 - j] du_t: AHEAD rows of one segment and this run.
        if i + AHEAD <= tl.minimum(i_end, i_last):
            for n in tl.static_range(AHEAD):
                b_du, b_inputs = _backward_row(b_rows[n], b_dys[n], b_window, b_w, eps, W, SILU, UNIT_LENGTH, dtype)
                b_window = b_inputs[: W - 1]
                b_dw = _add_products(b_dw, b_du, b_inputs, W)
                if du is not None:
                    _store(du + (i + n).to(tl.int64) * C + b_c, 0.5 * b_du, None, m_c)
                b_sums, b_dx = _add_row(b_sums, b_du, b_w, W)
                i_done = i + n - (W - 1)
                _store_dx(dx, stride_dx, token_of_dx, i_done, b_dx, i_done >= i_open, b_c, m_c)
        else:
            # The same, row by row: a segment or the run ends among the rows.
            for n in range(0, tl.minimum(AHEAD, i_last + W - 1 - i)):
                i_row = i + n
                exists = i_row < num_rows
                # At a segment's end the gradients of its last W - 1 inputs are finished, with the gradient of its tail
                # added. From here on only rows of the next segment are unfinished.
                if i_row == i_end:
                    for j in tl.static_range(1, W):
                        i_done = i_row - j
                        mine = (i_done >= i_open) & (i_done < i_last)
                        b_dx = b_sums[j - 1]
                        if dtail is not None:
                            b_dx += _tail_row(dtail, i_segment, W - 1 - j, mine, b_c, m_c, C, W)
                        _store_dx(dx, stride_dx, token_of_dx, i_done, b_dx, mine, b_c, m_c)
                    i_open = i_row
                    i_segment = tl.load(segment_of_row + i_row, mask=exists, other=0)
                    i_end = tl.load(cu_seqlens + i_segment + 1, mask=exists, other=-1)
                    b_window = _inputs_before_segment(initial_tail, i_segment, exists, b_c, m_c, C, W, BC)
                # Only rows of this run count for dw, du and dx; b_sums still needs the rows of the next run.
                i_at = tl.minimum(i_row, num_rows - 1).to(tl.int64)
                b_x = _load(x + _source(token_of_row, i_row, num_rows).to(tl.int64) * stride_x + b_c, m_c)
                b_dy = _load(dy + i_at * stride_dy + b_c, m_c)
                b_du, b_inputs = _backward_row(b_x, b_dy, b_window, b_w, eps, W, SILU, UNIT_LENGTH, dtype)
                b_window = b_inputs[: W - 1]
                mine = i_row < i_last
                b_dw = _add_products(b_dw, tl.where(mine, b_du, 0.0), b_inputs, W)
                if du is not None:
                    _store(du + i_row.to(tl.int64) * C + b_c, 0.5 * b_du, mine, m_c)
                b_sums, b_dx = _add_row(b_sums, b_du, b_w, W)
                i_done = i_row - (W - 1)
                mine = (i_done >= i_open) & (i_done < i_last)
                _store_dx(dx, stride_dx, token_of_dx, i_done, b_dx, mine, b_c, m_c)
        b_rows = b_next
        b_dys = b_next_dys
    # The run's share of dw; 0.5 for the factor 2 of du.
    for j in tl.static_range(W):
        p_parts = dweight_parts + (i_run * W + W - 1 - j).to(tl.int64) * stride_parts + b_c
        _store(p_parts, 0.5 * b_dw[j], None, m_c)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    x, weight, initial_tail, dy, dtail, dx, du, dweight_parts, token_of_row, token_of_dx, segment_of_row, cu_seqlens,
    copied, copy, token_of_copy, num_rows, eps, STRIDE_X: tl.constexpr, STRIDE_DY: tl.constexpr,
    STRIDE_DX: tl.constexpr, STRIDE_PARTS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    UNIT_LENGTH: tl.constexpr, BC: tl.constexpr, FIRST: tl.constexpr, STRIDE_COPY: tl.constexpr,
    COLUMNS: tl.constexpr, BG: tl.constexpr, RUN: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Tuples and blocks as of :func:`_forward_kernel`."""
    i_block = tl.program_id(1)
    for n in tl.static_range(len(x)):
        if (i_block >= FIRST[n]) & (i_block < FIRST[n + 1]):
            _backward_walk(
                x[n], weight[n], initial_tail[n], dy[n], dtail[n], dx[n], du[n], dweight_parts[n], token_of_row[n],
                token_of_dx, segment_of_row, cu_seqlens, num_rows, eps, tl.program_id(0), i_block - FIRST[n],
                STRIDE_X[n], STRIDE_DY[n], STRIDE_DX[n], STRIDE_PARTS, C[n], W, SILU[n], UNIT_LENGTH[n], RUN,
                AHEAD, BC[n],
            )  # fmt: skip
    if copied is not None:
        if i_block >= FIRST[len(x)]:
            _copy_columns(
                copied, copy, None, token_of_copy, tl.program_id(0), i_block - FIRST[len(x)], num_rows,
                COLUMNS, STRIDE_COPY, COLUMNS, RUN, BG,
            )  # fmt: skip
