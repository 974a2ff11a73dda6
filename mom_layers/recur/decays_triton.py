"""What kernels compute with one log decay for each row and head: decays between rows, and their gradient.

With G the sum of g from a chunk's first row on, S the state before a chunk and dS the gradient of the state after it.

Shape legend: heads H, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sums_of_decays(b_g):
    """G [BT] from g [BT] in float32, as two float32 parts whose sum it is.

    After strong decay G is in the thousands, and rounding G to float32 would lose the small differences between rows
    that still see each other.
    """
    b_G = tl.cumsum(b_g.to(tl.float64), 0)
    b_high = b_G.to(tl.float32)
    return b_high, (b_G - b_high.to(tl.float64)).to(tl.float32)


@triton.jit
def between(b_high, b_low):
    """exp(G_i - G_j) [BT, BT] from the two parts of G, zero above the diagonal."""
    b_between = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    # Masked before exp: above the diagonal the exponent is positive and could overflow.
    o_t = tl.arange(0, b_high.shape[0])
    return tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_between, float("-inf")))


@triton.jit
def decay_between(b_g):
    """exp(G_i - G_j) [BT, BT] from g [BT] in float32, zero above the diagonal."""
    b_high, b_low = sums_of_decays(b_g)
    return between(b_high, b_low)


@triton.jit
def decay_through_chunk(
    totals, boundary, chunk_offsets, span_offsets, i_c, i_s, i_h, i_index, num_slots,
    H: tl.constexpr, SPAN: tl.constexpr, PARTS: tl.constexpr, BOUNDARY_PARTS: tl.constexpr, FROM_ZERO: tl.constexpr,
):  # fmt: skip
    """exp(G_last) <S, dS> of a chunk, from <S, dS> where its span ends and where its span starts.

    Every step away from an end adds rounding errors, so the two answers are weighted by the steps that they take. At
    the start of a segment <S, dS> is zero, or not known where there is an initial state: then the answer is the end's.
    """
    # Where the chunk stands in its span, and the weight of the answer from the span's start.
    i_place = i_index % SPAN
    i_span = (tl.load(span_offsets + i_s) + i_index // SPAN).to(tl.int64) * H + i_h
    i_left = tl.load(chunk_offsets + i_s + 1) - i_c
    num_later = tl.minimum(SPAN - i_place, i_left)
    known = FROM_ZERO | (i_index >= SPAN)
    from_start = tl.where(known, (2.0 * num_later - 1.0) / (2.0 * num_later + 2.0 * i_place), 0.0)
    # The sums (15) of the span's chunks, this chunk at offset 0. The answer from the end is <S, dS> there, plus `from`
    # less `to` of every later chunk, less `to` of this one. The answer from the start is <S, dS> there, plus the same
    # sums, plus `to` less `from` of all chunks. A segment's last chunk has no `to`: its <S, dS> is the decayed part's.
    o_chunk = tl.arange(0, SPAN) - i_place
    p_totals = totals + ((i_c + o_chunk).to(tl.int64) * H + i_h) * PARTS
    to_state = num_slots.to(tl.int64) * H * PARTS
    b_sum = tl.zeros([SPAN], tl.float32)
    for i_part in tl.static_range(PARTS):
        b_from = tl.load(p_totals + i_part, mask=o_chunk < i_left, other=0.0)
        b_to = tl.load(p_totals + to_state + i_part, mask=o_chunk < i_left - 1, other=0.0)
        b_sum += tl.where(o_chunk > 0, b_from, 0.0) - tl.where(o_chunk >= 0, b_to, 0.0)
        b_sum += from_start * (b_to - b_from)
    d_chunk_decay = tl.sum(b_sum, 0)
    # <S, dS> where the span ends, and where the span before ends.
    p_boundary = boundary + i_span * BOUNDARY_PARTS
    for i_part in tl.static_range(BOUNDARY_PARTS):
        d_chunk_decay += (1.0 - from_start) * tl.load(p_boundary + i_part)
        d_chunk_decay += from_start * tl.load(p_boundary - H * BOUNDARY_PARTS + i_part, mask=i_index >= SPAN, other=0.0)
    return d_chunk_decay
