"""Gated linear attention: the scores P of chunks that are not whole.

Shape legend: rows R, segments S, heads H, key size K, chunk length BT, block length BC, chunk slots N.

Where a chunk decays too strongly for the one product of `chunk_local`, the chunk is cut into four blocks of BC = 16
rows. With sums of g written as there, for a row i and the rows j of the blocks before i's block, whose first row is f,

    (21)  P_ij = scale * sum_K (q_i exp(g[f, i])) (k_j exp(g(j, f)))

is a matrix product. `blocks` has the pairs inside a block. Every sum of g is taken over its own rows and never as a
difference of two longer sums: no exponent is positive, and a small sum after strong decay keeps its digits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import Inputs
from mom_layers.recur.channel_decay.triton.blocks import (
    BLOCK,
    PRECISION,
    exponents,
    late_rows,
    meet,
    rows_after,
    rows_to_border,
    rows_until,
    sums_of_rows,
)
from mom_layers.recur.channel_decay.triton.launches import Launch
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import tile_of_chunk


@triton.jit(do_not_specialize=["num_segments"])
def _block_scores_kernel(
    q,
    k,
    g,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    whole_chunks,
    scores,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BC rows of P of one chunk and head that are not whole."""
    i_b, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, BT // BC)
    i_chunk = i_c.to(tl.int64) * H + i_h
    # Of a slot past the last chunk the flag is meaningless.
    if (i_s >= num_segments) | (tl.load(whole_chunks + i_chunk) != 0):
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    rows = i_row.to(tl.int64) * H + i_h
    first = i_b * BC
    num_earlier = tl.where(first < last, i_b, 0)  # blocks to read; none from an empty block
    o_r = tl.arange(0, BC)
    low = q.dtype.element_ty
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32

    b_D = tl.zeros([BC, BC], tl.float32)
    b_P1 = tl.zeros([BC, BC], tl.float32)  # columns of the block before this one
    b_P2 = tl.zeros([BC, BC], tl.float32)  # columns two blocks before
    b_P3 = tl.zeros([BC, BC], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_rk = rows * K + (first + o_r)[:, None] * (H * K) + o_k[None, :]
        m_r = (first + o_r < last)[:, None]
        b_q = tl.load(q + p_rk, mask=m_r, other=0.0)  # [BC, BK]
        b_k = tl.load(k + p_rk, mask=m_r, other=0.0)  # [BC, BK]
        b_g = exponents(tl.load(g + p_rk, mask=m_r, other=0.0))  # [BC, BK]

        # The columns of this block.
        b_pairs = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_D += tl.where(o_r[:, None] == o_r[None, :], b_pairs, 0.0)
        for i in tl.static_range(4):
            b_decay = tl.exp2(sums_of_rows(rows_to_border(BC, 8 >> i), b_g, EXACT))
            b_x = tl.where(late_rows(BC, 8 >> i)[:, None], b_q * b_decay, b_k * b_decay).to(low)
            b_pairs = tl.dot(b_x, tl.trans(b_x), input_precision=PRECISION)
            b_D += tl.where(meet(BC, 8 >> i) & (o_r[:, None] > o_r[None, :]), b_pairs, 0.0)

        # Equation (21): the columns of the blocks before this one, the nearest first. Their rows all exist.
        if num_earlier >= 1:
            b_from = (b_q * tl.exp2(sums_of_rows(rows_until(BC), b_g, EXACT))).to(low)
            b_sum = tl.zeros([BC, BK], tl.float32)  # g from a block's end to this block, in every row
            b_P1, b_sum = _add_earlier(b_P1, b_from, b_sum, k, g, p_rk - BC * H * K, BC, EXACT)
            if num_earlier >= 2:
                b_P2, b_sum = _add_earlier(b_P2, b_from, b_sum, k, g, p_rk - 2 * BC * H * K, BC, EXACT)
                if num_earlier >= 3:
                    b_P3, b_sum = _add_earlier(b_P3, b_from, b_sum, k, g, p_rk - 3 * BC * H * K, BC, EXACT)

    p_P = scores + i_chunk * BT * BT + (first + o_r)[:, None] * BT + o_r[None, :]
    tl.store(p_P + first, (scale * b_D).to(low))
    # Zero in the columns of later blocks.
    zero = tl.zeros([BC, BC], low)
    for i in tl.static_range(BT // BC):
        if i > i_b:
            tl.store(p_P + i * BC, zero)
    if i_b >= 1:
        tl.store(p_P + first - BC, (scale * b_P1).to(low))
    if i_b >= 2:
        tl.store(p_P + first - 2 * BC, (scale * b_P2).to(low))
    if i_b >= 3:
        tl.store(p_P + first - 3 * BC, (scale * b_P3).to(low))


@triton.jit
def _add_earlier(b_P, b_q, b_sum, k, g, p_rk, BC: tl.constexpr, EXACT: tl.constexpr):
    """Adds to b_P [BC, BC] the products of queries with an earlier block's keys, and to b_sum [BC, BK] the block's g.

    p_rk: where the earlier block's rows are.
    """
    b_k = tl.load(k + p_rk)  # [BC, BK]
    b_g = exponents(tl.load(g + p_rk))  # [BC, BK]
    b_k = (b_k * tl.exp2(sums_of_rows(rows_after(BC), b_g, EXACT) + b_sum)).to(b_q.dtype)
    all_rows = tl.full([BC, BC], 1.0, tl.float32)
    return tl.dot(b_q, tl.trans(b_k), b_P, input_precision=PRECISION), b_sum + sums_of_rows(all_rows, b_g, EXACT)


def block_scores(inputs: Inputs, chunks: Chunks, whole_chunks: torch.Tensor, scores: torch.Tensor, launch: Launch):
    """Writes P of the chunks and heads that are not whole to ``scores`` [N, H, BT, BT].

    whole_chunks: [N, H] int32, from `chunk_local`.
    """
    heads, k_dim = inputs.num_heads, inputs.k_dim
    _block_scores_kernel[(chunks.num_slots * heads * (CHUNK // BLOCK),)](
        q=inputs.q,
        k=inputs.k,
        g=inputs.g,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        whole_chunks=whole_chunks,
        scores=scores,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        BT=CHUNK,
        BC=BLOCK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
