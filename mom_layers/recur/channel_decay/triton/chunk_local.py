"""Gated linear attention: what a chunk computes from its own rows, without the state.

Shape legend: rows R, segments S, heads H, key size K, chunk length BT, block length BC, chunk slots N.

Sums of g over rows a < t <= b, channel by channel, are written g(a, b]; start is the row before the chunk's first row,
end its last row:

    (1)  P_ij = scale * sum_K q_i k_j exp(g(j, i])       j <= i
    (2)  q~_i = scale * q_i exp(g(start, i])
    (3)  k~_j = k_j exp(g(j, end])
    (4)  decays = exp(g(start, end])

P has a decay for every pair of rows and every channel, which no matrix product computes. So a chunk is cut into four
blocks of BC = 16 rows. For a row i and the rows j of the blocks before i's block, whose first row is f,

    (5)  P_ij = scale * sum_K (q_i exp(g[f, i])) (k_j exp(g(j, f)))

is a matrix product. `blocks` has the pairs inside a block. Every sum of g is taken over its own rows and never as a
difference of two longer sums: no exponent is positive, and a small sum after strong decay keeps its digits.

Every large matrix product takes its left operand from memory as it was stored, never from registers: ptxas of CUDA 12.8
and 12.9 miscompiles Hopper's asynchronous products with a left operand in registers (Triton pull request 11781). So q~,
k~ and P go through memory. The products of 16 rows are synchronous.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import ChunkLocal, Inputs
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
from mom_layers.recur.channel_decay.triton.launches import Launch, launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import tile_of_chunk


@triton.jit(do_not_specialize=["num_segments"])
def _decayed_rows_kernel(
    q,
    k,
    g,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    q_decayed,
    k_decayed,
    decays,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BK channels of q~ (2), k~ (3) and the decays (4) of one chunk and head."""
    i_k, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, K // BK)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    o_r = tl.arange(0, BC)
    o_k = i_k * BK + tl.arange(0, BK)
    p_chunk = (i_row.to(tl.int64) * H + i_h) * K + o_r[:, None] * (H * K) + o_k[None, :]
    all_rows = tl.full([BC, BC], 1.0, tl.float32)
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32

    b_sum = tl.zeros([BC, BK], tl.float32)  # g from the chunk's start to the block, in every row
    for i in range(0, BT, BC):
        m_r = (i + o_r < last)[:, None]
        p_rk = p_chunk + i * H * K
        b_g = exponents(tl.load(g + p_rk, mask=m_r, other=0.0))  # [BC, BK]
        b_q = tl.load(q + p_rk, mask=m_r, other=0.0)  # [BC, BK]
        b_q = scale * (b_q * tl.exp2(sums_of_rows(rows_until(BC), b_g, EXACT) + b_sum))
        tl.store(q_decayed + p_rk, b_q.to(q_decayed.dtype.element_ty), mask=m_r)
        b_sum += sums_of_rows(all_rows, b_g, EXACT)
    tl.store(decays + (i_c.to(tl.int64) * H + i_h) * K + o_k, tl.exp2(tl.max(b_sum, 0)))

    b_sum = tl.zeros([BC, BK], tl.float32)  # g from the block to the chunk's end
    for i_back in range(BC, BT + BC, BC):
        m_r = (BT - i_back + o_r < last)[:, None]
        p_rk = p_chunk + (BT - i_back) * H * K
        b_g = exponents(tl.load(g + p_rk, mask=m_r, other=0.0))  # [BC, BK]
        b_k = tl.load(k + p_rk, mask=m_r, other=0.0)  # [BC, BK]
        b_k = b_k * tl.exp2(sums_of_rows(rows_after(BC), b_g, EXACT) + b_sum)
        tl.store(k_decayed + p_rk, b_k.to(k_decayed.dtype.element_ty), mask=m_r)
        b_sum += sums_of_rows(all_rows, b_g, EXACT)


@triton.jit(do_not_specialize=["num_segments"])
def _scores_kernel(
    q,
    k,
    g,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    scores,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BC rows of P of one chunk and head."""
    i_b, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, BT // BC)
    if i_s >= num_segments:
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

        # Equation (5): the columns of the blocks before this one, the nearest first. Their rows all exist.
        if num_earlier >= 1:
            b_from = (b_q * tl.exp2(sums_of_rows(rows_until(BC), b_g, EXACT))).to(low)
            b_sum = tl.zeros([BC, BK], tl.float32)  # g from a block's end to this block, in every row
            b_P1, b_sum = _add_earlier(b_P1, b_from, b_sum, k, g, p_rk - BC * H * K, BC, EXACT)
            if num_earlier >= 2:
                b_P2, b_sum = _add_earlier(b_P2, b_from, b_sum, k, g, p_rk - 2 * BC * H * K, BC, EXACT)
                if num_earlier >= 3:
                    b_P3, b_sum = _add_earlier(b_P3, b_from, b_sum, k, g, p_rk - 3 * BC * H * K, BC, EXACT)

    p_P = scores + (i_c.to(tl.int64) * H + i_h) * BT * BT + (first + o_r)[:, None] * BT + o_r[None, :]
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


def chunk_local(
    *, inputs: Inputs, chunks: Chunks, scores: torch.Tensor | None = None, launches_for=launches_for
) -> ChunkLocal:
    """Equations (1) to (5) of every chunk.

    Args:
        inputs, chunks: of the same rows.
        scores: P of an earlier call; computed when absent.
        launches_for: a kernel set's, with fields as the general set's.
    """
    launches = launches_for(inputs.q.device, inputs.q.dtype, inputs.k_dim, inputs.v_dim)
    q_decayed, k_decayed, decays = _decayed_rows(inputs, chunks, launches.decayed_rows)
    scores = _scores(inputs, chunks, launches.scores) if scores is None else scores
    return ChunkLocal(q_decayed, k_decayed, decays, scores)


def _decayed_rows(inputs: Inputs, chunks: Chunks, launch: Launch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q~, k~ [R, H, K] in q's type, and the decays [N, H, K] float32."""
    q, heads, k_dim = inputs.q, inputs.num_heads, inputs.k_dim
    q_decayed, k_decayed = torch.empty_like(q), torch.empty_like(inputs.k)
    decays = torch.empty(chunks.num_slots, heads, k_dim, dtype=torch.float32, device=q.device)
    _decayed_rows_kernel[(chunks.num_slots * heads * (k_dim // launch.tile),)](
        q=q,
        k=inputs.k,
        g=inputs.g,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        q_decayed=q_decayed,
        k_decayed=k_decayed,
        decays=decays,
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
    return q_decayed, k_decayed, decays


def _scores(inputs: Inputs, chunks: Chunks, launch: Launch) -> torch.Tensor:
    """P of every chunk [N, H, BT, BT] in q's type."""
    q, heads, k_dim = inputs.q, inputs.num_heads, inputs.k_dim
    scores = torch.empty(chunks.num_slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
    _scores_kernel[(chunks.num_slots * heads * (CHUNK // BLOCK),)](
        q=q,
        k=inputs.k,
        g=inputs.g,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
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
    return scores
