"""Forward kernels of gated linear attention: what a chunk knows by itself, then the recurrence from chunk to chunk.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, block length BC, chunk slots N.

With S the state at the chunk's start, and sums of g over rows a < t <= b, channel by channel, written g(a, b],

    P_ij = scale * sum_K q_i k_j exp(g(j, i])             j <= i
    q~_i = scale * q_i exp(g(start, i])                   k~_j = k_j exp(g(j, end])
    o = q~ S + P v
    S <- diag(exp(g(start, end])) S + k~^T v

P needs a decay for every pair of rows and channel, which no matrix product has. So a chunk is four blocks of 16 rows: a
row and an earlier block both decay to the row's block's start, and meet in a product; pairs inside a block are summed
channel by channel. Every sum of g is taken over its own rows and never as a difference of two longer ones: no exponent
is positive, and a small sum after strong decay keeps its digits.

Left operands: as said in the gated delta rule's forward file, Hopper's asynchronous products must not take theirs from
registers. q~, k~ and P go through memory; the products of 16 rows are synchronous ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.channel_decay.launch import launch_for
from mom_layers.recur.chunk_table import CHUNK, ChunkTable

# Rows of a block: the least that a product takes.
BLOCK = 16
# Chunks a group: the state is stored once a group for the backward pass, which computes the others again.
GROUP = 4
# Products of float32 inputs are exact in float32: no tf32. Other types ignore it.
PRECISION = tl.constexpr("ieee")


@triton.jit
def keys_until(k, g, rows, o_t, o_k, first, last, H: tl.constexpr, K: tl.constexpr):
    """k_j exp(g(j, first)) of the chunk's rows j < first, zero after them, and ``last`` rows exist. float32 [BT, BK].

    k, g: pointers to the head's first row of the chunk and column.
    """
    m_t = (o_t < first) & (o_t < last)
    m_next = (o_t + 1 < first) & (o_t + 1 < last)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
    b_next = tl.load(g + rows * K + H * K + o_tk, mask=m_next[:, None], other=0.0).to(tl.float32)  # [BT, BK]
    return b_k * exp(tl.cumsum(b_next, 0, reverse=True))


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
    chunk_decay,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """q~, k~ and the decay of BK channels of one chunk and head."""
    i_k = tl.program_id(0) % (K // BK)
    i_h = tl.program_id(0) // (K // BK) % H
    i_c = tl.program_id(0) // (K // BK) // H
    i_s = tl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    o_k = i_k * BK + tl.arange(0, BK)
    m_tk = (o_t < last)[:, None]
    p_tk = rows * K + o_t[:, None] * (H * K) + o_k[None, :]

    b_q = tl.load(q + p_tk, mask=m_tk, other=0.0).to(tl.float32)  # [BT, BK]
    b_g = tl.load(g + p_tk, mask=m_tk, other=0.0).to(tl.float32)  # [BT, BK]
    b_q = scale * b_q * exp(tl.cumsum(b_g, 0))
    b_k = keys_until(k, g, rows, o_t, o_k, BT, last, H, K)
    tl.store(q_decayed + p_tk, b_q.to(q_decayed.dtype.element_ty), mask=m_tk)
    tl.store(k_decayed + p_tk, b_k.to(k_decayed.dtype.element_ty), mask=m_tk)
    tl.store(chunk_decay + (i_c.to(tl.int64) * H + i_h) * K + o_k, exp(tl.sum(b_g, 0)))


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
    i_b = tl.program_id(0) % (BT // BC)
    i_h = tl.program_id(0) // (BT // BC) % H
    i_c = tl.program_id(0) // (BT // BC) // H
    i_s = tl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    rows = i_row.to(tl.int64) * H + i_h
    first = i_b * BC
    o_t = tl.arange(0, BT)
    o_r = tl.arange(0, BC)
    m_r = (first + o_r < last)[:, None]
    num_rows = tl.minimum(last - first, BC)
    low = q.dtype.element_ty

    b_P = tl.zeros([BC, BT], tl.float32)
    b_D = tl.zeros([BC, BC], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_rk = rows * K + (first + o_r)[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_rk, mask=m_r, other=0.0).to(tl.float32)  # [BC, BK]
        b_g = tl.load(g + p_rk, mask=m_r, other=0.0).to(tl.float32)  # [BC, BK]
        b_k = keys_until(k, g, rows, o_t, o_k, first, last, H, K).to(low)  # [BT, BK]
        b_q_low = (b_q * exp(tl.cumsum(b_g, 0))).to(low)
        b_P += tl.dot(b_q_low, tl.trans(b_k), input_precision=PRECISION)

        # Column after column of the block, the last one first: b_A is g(j, i].
        b_A = tl.zeros([BC, BK], tl.float32)
        for i in range(0, num_rows):
            j = num_rows - 1 - i
            p_j = rows * K + (first + j) * (H * K) + o_k
            b_kj = tl.load(k + p_j).to(tl.float32)  # [BK]
            b_gj = tl.load(g + p_j).to(tl.float32)  # [BK]
            b_column = tl.sum(b_q * b_kj[None, :] * exp(b_A), 1)  # [BC]
            b_D += tl.where((o_r[None, :] == j) & (o_r[:, None] >= j), b_column[:, None], 0.0)
            b_A += tl.where(o_r[:, None] >= j, b_gj[None, :], 0.0)

    p_P = scores + (i_c.to(tl.int64) * H + i_h) * BT * BT + (first + o_r)[:, None] * BT
    tl.store(p_P + o_t[None, :], (scale * b_P).to(low), mask=(o_t // BC != i_b)[None, :])
    tl.store(p_P + first + o_r[None, :], (scale * b_D).to(low))


@triton.jit
def _recurrence_kernel(
    q_decayed,
    k_decayed,
    v,
    chunk_decay,
    scores,
    cu_seqlens,
    chunk_offsets,
    group_offsets,
    initial_state,
    o,
    final_state,
    checkpoints,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
):
    """BV columns of the state along one segment and head. For the backward pass also every GROUP-th state."""
    # The last segments start first: in a Mixture-of-Memories they are the shared memory's, the longest ones.
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = (tl.num_programs(0) - 1 - tl.program_id(0)) // (V // BV) // H
    i_first = tl.load(cu_seqlens + i_s)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    i_chunk = tl.load(chunk_offsets + i_s).to(tl.int64) * H + i_h
    rows = i_first.to(tl.int64) * H + i_h

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = v.dtype.element_ty

    if HAS_INITIAL_STATE:
        b_S = tl.load(initial_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_S = tl.zeros([K, BV], tl.float32)
    for i_t in range(0, tl.cdiv(num_rows, BT)):
        m_t = (i_t * BT + o_t < num_rows)[:, None]
        b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_decay = tl.load(chunk_decay + i_chunk * K + o_k)[:, None]  # [K, 1]
        b_S_low = b_S.to(low)
        if FOR_BACKWARD:
            if i_t % GROUP == 0:
                i_group = (tl.load(group_offsets + i_s) + i_t // GROUP).to(tl.int64) * H + i_h
                tl.store(checkpoints + i_group * K * V + o_kv, b_S_low)
        b_o = tl.dot(b_q, b_S_low, input_precision=PRECISION)
        b_o += tl.dot(b_P, b_v, input_precision=PRECISION)
        tl.store(o + rows * V + o_tv, b_o.to(low), mask=m_t)
        b_S = b_decay * b_S
        b_S += tl.dot(tl.trans(b_k), b_v, input_precision=PRECISION)
        rows += BT * H
        i_chunk += H
    if STORE_FINAL_STATE:
        tl.store(final_state + i_state + o_kv, b_S)


def decayed_rows(q, k, g, cu_seqlens, table: ChunkTable, scale):
    """q~ and k~ [R, H, K] in q's type, and every chunk's decay [N, H, K] float32."""
    (_, heads, key_size), slots = q.shape, table.segment.shape[0]
    q_decayed, k_decayed = torch.empty_like(q), torch.empty_like(k)
    chunk_decay = torch.empty(slots, heads, key_size, dtype=torch.float32, device=q.device)
    launch = launch_for("decayed_rows", q, key_size)
    _decayed_rows_kernel[(slots * heads * (key_size // launch.tile),)](
        q=q,
        k=k,
        g=g,
        cu_seqlens=cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        q_decayed=q_decayed,
        k_decayed=k_decayed,
        chunk_decay=chunk_decay,
        scale=scale,
        num_segments=cu_seqlens.shape[0] - 1,
        H=heads,
        K=key_size,
        BT=CHUNK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return q_decayed, k_decayed, chunk_decay


def chunk_scores(q, k, g, cu_seqlens, table: ChunkTable, scale):
    """P of every chunk [N, H, BT, BT] in q's type."""
    (_, heads, key_size), slots = q.shape, table.segment.shape[0]
    scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
    launch = launch_for("scores", q, key_size)
    _scores_kernel[(slots * heads * (CHUNK // BLOCK),)](
        q=q,
        k=k,
        g=g,
        cu_seqlens=cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        scores=scores,
        scale=scale,
        num_segments=cu_seqlens.shape[0] - 1,
        H=heads,
        K=key_size,
        BT=CHUNK,
        BC=BLOCK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return scores


def run_recurrence(q_decayed, k_decayed, v, chunk_decay, scores, cu_seqlens, table: ChunkTable, groups: ChunkTable,
                   initial_state, o, final_state=None, checkpoints=None):  # fmt: skip
    """Walks every segment and fills o [R, H, V], and whichever of the others are given.

    final_state: [S, H, K, V] float32. checkpoints: [groups' slots, H, K, V], the state before every group of chunks.
    """
    (_, heads, key_size), value_size = k_decayed.shape, v.shape[2]
    launch = launch_for("recurrence", v, value_size, key_size)
    _recurrence_kernel[((cu_seqlens.shape[0] - 1) * heads * (value_size // launch.tile),)](
        q_decayed=q_decayed,
        k_decayed=k_decayed,
        v=v,
        chunk_decay=chunk_decay,
        scores=scores,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        group_offsets=groups.offsets,
        initial_state=initial_state,
        o=o,
        final_state=final_state,
        checkpoints=checkpoints,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        GROUP=GROUP,
        HAS_INITIAL_STATE=initial_state is not None,
        STORE_FINAL_STATE=final_state is not None,
        FOR_BACKWARD=checkpoints is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
