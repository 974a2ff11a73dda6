"""Triton kernels of the inputs that a convolution over segments carries from one call to the next.

Shape legend: R rows, S segments, C channels, W taps. Tiles are BS or BT segments by BC channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
