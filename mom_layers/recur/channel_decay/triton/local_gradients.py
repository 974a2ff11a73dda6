"""Gated linear attention: the parts of dq, dk and dg that a chunk's own rows give.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, block length BC, chunk slots N.

Sums of g are written as in `chunk_local`. To the parts that the states give, these are added:

    (15)  dP = scale * lower(do v^T)
    (16)  dq_i = sum_{j <= i} dP_ij k_j exp(g(j, i])
    (17)  dk_j = sum_{i >= j} dP_ij q_i exp(g(j, i])
    (18)  dg_t = sum_{i >= t} (q_i * dq_i - k_i * dk_i)    dq and dk without the terms i = j

in blocks of BC = 16 rows, as P is. For a block with first row f and last row l, the pairs with rows of other blocks are
matrix products,

    (19)  dq_i = exp(g[f, i]) * sum_{j < f} dP_ij k_j exp(g(j, f))
    (20)  dk_j = exp(g(j, l]) * sum_{i > l} dP_ij q_i exp(g(l, i])

and the pairs inside the block are summed channel by channel. The terms i = j have no decay: in (18) they would have to
cancel, and under strong decay their rounding errors would be larger than dg.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.channel_decay.tensors import Gradients, Inputs
from mom_layers.recur.channel_decay.triton.chunk_local import BLOCK, PRECISION, keys_until
from mom_layers.recur.channel_decay.triton.launches import Launch, launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import chunk_of_program, tile_of_chunk


@triton.jit(do_not_specialize=["num_segments"])
def _score_gradients_kernel(
    v,
    do,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    d_scores,
    scale,
    num_segments,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """dP (15) of one chunk and head."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = (i_row + o_t < tl.load(cu_seqlens + i_s + 1))[:, None]
    b_dP = tl.zeros([BT, BT], tl.float32)
    for i_v in range(0, V, BV):
        o_tv = o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_dP += tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_dP = tl.where(o_t[:, None] >= o_t[None, :], scale * b_dP, 0.0)
    p_dP = d_scores + (i_c.to(tl.int64) * H + i_h) * BT * BT + o_t[:, None] * BT + o_t[None, :]
    tl.store(p_dP, b_dP.to(d_scores.dtype.element_ty))


@triton.jit
def _queries_from(q, g, rows, o_t, o_k, first, last, H: tl.constexpr, K: tl.constexpr):
    """q_i exp(g[first, i]) of the chunk's rows i >= first, zero before them; ``last`` rows exist. float32 [BT, BK]."""
    m_t = ((o_t >= first) & (o_t < last))[:, None]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    b_q = tl.load(q + rows * K + o_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
    b_g = tl.load(g + rows * K + o_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
    return b_q * exp(tl.cumsum(b_g, 0))


@triton.jit(do_not_specialize=["num_segments"])
def _query_key_gradients_kernel(
    q,
    k,
    g,
    d_scores,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    dq,
    dk,
    dg,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BK channels of dq, dk and dg of one chunk and head, added to what the states gave."""
    i_kb, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, K // BK)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    rows = i_row.to(tl.int64) * H + i_h
    p_dP = d_scores + (i_c.to(tl.int64) * H + i_h) * BT * BT
    o_t = tl.arange(0, BT)
    o_r = tl.arange(0, BC)
    o_k = i_kb * BK + tl.arange(0, BK)
    low = q.dtype.element_ty

    b_later = tl.zeros([BK], tl.float32)  # q * dq - k * dk, summed over the blocks after this one
    num_blocks = tl.cdiv(tl.minimum(last, BT), BC)
    for i_back in range(0, num_blocks):
        first = (num_blocks - 1 - i_back) * BC
        num_rows = tl.minimum(last - first, BC)
        m_r = first + o_r < last
        m_next = (o_r + 1 < BC) & (first + o_r + 1 < last)
        p_rk = rows * K + (first + o_r)[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_rk, mask=m_r[:, None], other=0.0).to(tl.float32)  # [BC, BK]
        b_k = tl.load(k + p_rk, mask=m_r[:, None], other=0.0).to(tl.float32)  # [BC, BK]
        b_g = tl.load(g + p_rk, mask=m_r[:, None], other=0.0).to(tl.float32)  # [BC, BK]
        b_next = tl.load(g + p_rk + H * K, mask=m_next[:, None], other=0.0).to(tl.float32)  # [BC, BK]

        # Equations (19) and (20): the pairs with rows of other blocks.
        b_dP = tl.load(p_dP + (first + o_r)[:, None] * BT + o_t[None, :])  # [BC, BT]
        b_earlier = keys_until(k, g, rows, o_t, o_k, first, last, H, K).to(low)  # [BT, BK]
        b_dq = exp(tl.cumsum(b_g, 0)) * tl.dot(b_dP, b_earlier, input_precision=PRECISION)
        b_dP = tl.load(p_dP + (first + o_r)[:, None] + o_t[None, :] * BT)  # [BC, BT], transposed
        b_later_q = _queries_from(q, g, rows, o_t, o_k, first + BC, last, H, K).to(low)  # [BT, BK]
        b_dk = tl.dot(b_dP, b_later_q, input_precision=PRECISION)
        b_dk = exp(tl.cumsum(b_next, 0, reverse=True)) * b_dk

        # Equation (16) for the pairs j < i of this block, the last key first: b_A is g(j, i] of the queries i after j.
        b_A = tl.zeros([BC, BK], tl.float32)
        for i in range(0, num_rows):
            j = num_rows - 1 - i
            p_j = rows * K + (first + j) * (H * K) + o_k
            b_kj = tl.load(k + p_j).to(tl.float32)  # [BK]
            b_gj = tl.load(g + p_j).to(tl.float32)  # [BK]
            b_column = tl.load(p_dP + (first + o_r) * BT + first + j).to(tl.float32)  # [BC]
            b_dq += tl.where((o_r > j)[:, None], b_column[:, None] * b_kj[None, :] * exp(b_A), 0.0)
            b_A += tl.where((o_r >= j)[:, None], b_gj[None, :], 0.0)

        # Equation (17) for the same pairs, the first query first: b_A is g(j, i] of the keys j before i.
        b_A = tl.zeros([BC, BK], tl.float32)
        for i in range(0, num_rows):
            p_i = rows * K + (first + i) * (H * K) + o_k
            b_qi = tl.load(q + p_i).to(tl.float32)  # [BK]
            b_gi = tl.load(g + p_i).to(tl.float32)  # [BK]
            b_row = tl.load(p_dP + (first + i) * BT + first + o_r).to(tl.float32)  # [BC]
            b_A += tl.where((o_r < i)[:, None], b_gi[None, :], 0.0)
            b_dk += tl.where((o_r < i)[:, None], b_row[:, None] * b_qi[None, :] * exp(b_A), 0.0)

        # Equation (18), before the terms i = j join dq and dk.
        b_exponent = b_q * b_dq - b_k * b_dk
        b_dg = tl.cumsum(b_exponent, 0, reverse=True) + b_later[None, :]
        b_later += tl.sum(b_exponent, 0)
        b_dg += tl.load(dg + p_rk, mask=m_r[:, None], other=0.0)
        tl.store(dg + p_rk, b_dg, mask=m_r[:, None])

        # Equations (16) and (17) for i = j, and the sums with what the states gave.
        b_diagonal = tl.load(p_dP + (first + o_r) * (BT + 1)).to(tl.float32)[:, None]  # [BC, 1]
        b_dq += b_diagonal * b_k + tl.load(dq + p_rk, mask=m_r[:, None], other=0.0).to(tl.float32)
        b_dk += b_diagonal * b_q + tl.load(dk + p_rk, mask=m_r[:, None], other=0.0).to(tl.float32)
        tl.store(dq + p_rk, b_dq.to(low), mask=m_r[:, None])
        tl.store(dk + p_rk, b_dk.to(low), mask=m_r[:, None])


def local_gradients(
    *, inputs: Inputs, do: torch.Tensor, chunks: Chunks, so_far: Gradients, launches_for=launches_for
) -> None:
    """Equations (15) to (20) of every chunk, added to the gradients in place.

    Args:
        inputs, chunks: of the same rows.
        do: [R, H, V], the gradient of o, contiguous.
        so_far: the parts that the states give, from ``state_gradients``; becomes the gradients.
        launches_for: a kernel set's, with fields as the general set's.
    """
    q, heads, k_dim = inputs.q, inputs.num_heads, inputs.k_dim
    launches = launches_for(q.device, q.dtype, k_dim, inputs.v_dim)
    d_scores = _score_gradients(inputs, do, chunks, launches.score_gradients)
    launch = launches.query_key_gradients
    _query_key_gradients_kernel[(chunks.num_slots * heads * (k_dim // launch.tile),)](
        q=q,
        k=inputs.k,
        g=inputs.g,
        d_scores=d_scores,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        dq=so_far.dq,
        dk=so_far.dk,
        dg=so_far.dg,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        BT=CHUNK,
        BC=BLOCK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _score_gradients(inputs: Inputs, do: torch.Tensor, chunks: Chunks, launch: Launch) -> torch.Tensor:
    """dP of every chunk [N, H, BT, BT] in q's type."""
    v, heads, v_dim = inputs.v, inputs.num_heads, inputs.v_dim
    d_scores = torch.empty(chunks.num_slots, heads, CHUNK, CHUNK, dtype=v.dtype, device=v.device)
    _score_gradients_kernel[(chunks.num_slots * heads,)](
        v=v,
        do=do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        d_scores=d_scores,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return d_scores
