"""Backward kernels of gated linear attention that walk along the state; names and equations as in the forward file.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, group slots M.

With dS the gradient of the state after the chunk, a chunk of the reverse recurrence is

    dv = P^T do + k~ dS
    dS <- diag(exp(g(start, end])) dS + q~^T do

Neither S nor dS is stored for every chunk. From one of each a group of chunks, they are computed again in tiles of K by
programs that share nothing, and what they owe to the gradients is taken on the way:

    from_state_q = scale * exp(g(start, i]) * (do S^T)    part of dq
    to_state_k   = exp(g(j, end]) * (v dS^T)              part of dk
    dg_t gets the sum over i >= t of q * from_state_q, over j < t of k * to_state_k, and the whole chunk's decay times
    the sum over V of S * dS
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.channel_decay.launch import launch_for
from mom_layers.recur.channel_decay.triton.forward import GROUP, PRECISION
from mom_layers.recur.chunk_table import CHUNK, ChunkTable


@triton.jit
def _reverse_recurrence_kernel(
    q_decayed,
    k_decayed,
    chunk_decay,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    group_offsets,
    d_final_state,
    d_initial_state,
    d_checkpoints,
    dv,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_D_FINAL_STATE: tl.constexpr,
    STORE_D_INITIAL_STATE: tl.constexpr,
):
    """BV columns of dS along one segment and head, from its last chunk to its first. Stores dv, and dS where a group of
    chunks ends."""
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = (tl.num_programs(0) - 1 - tl.program_id(0)) // (V // BV) // H
    i_first = tl.load(cu_seqlens + i_s)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = tl.cdiv(num_rows, BT)
    i_first_chunk = tl.load(chunk_offsets + i_s)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = do.dtype.element_ty

    if HAS_D_FINAL_STATE:
        b_dS = tl.load(d_final_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_dS = tl.zeros([K, BV], tl.float32)
    for i_back in range(0, num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = (i_t * BT + o_t < num_rows)[:, None]
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_first_chunk + i_t).to(tl.int64) * H + i_h
        b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_decay = tl.load(chunk_decay + i_chunk * K + o_k)[:, None]  # [K, 1]
        b_dS_low = b_dS.to(low)
        if (i_t % GROUP == GROUP - 1) | (i_back == 0):
            i_group = (tl.load(group_offsets + i_s) + i_t // GROUP).to(tl.int64) * H + i_h
            tl.store(d_checkpoints + i_group * K * V + o_kv, b_dS_low)
        b_dv = tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        b_dv += tl.dot(b_k, b_dS_low, input_precision=PRECISION)
        tl.store(dv + rows * V + o_tv, b_dv.to(low), mask=m_t)
        b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_dS = b_decay * b_dS
        b_dS += tl.dot(tl.trans(b_q), b_do, input_precision=PRECISION)
    if STORE_D_INITIAL_STATE:
        tl.store(d_initial_state + i_state + o_kv, b_dS)


@triton.jit(do_not_specialize=["num_segments"])
def _state_gradients_kernel(
    q,
    k,
    v,
    g,
    q_decayed,
    k_decayed,
    chunk_decay,
    do,
    checkpoints,
    d_checkpoints,
    cu_seqlens,
    chunk_offsets,
    group_segment,
    group_index,
    dq,
    dk,
    dg,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """BK rows of dS along one group of chunks and head against time, and S from the group's start for each of them.

    S is walked from the checkpoint for every chunk anew: that is 1.5 products a chunk more, and no state in memory.
    """
    i_kb = tl.program_id(0) % (K // BK)
    i_h = tl.program_id(0) // (K // BK) % H
    i_g = tl.program_id(0) // (K // BK) // H
    i_s = tl.load(group_segment + i_g)
    if i_s >= num_segments:
        return
    i_first_chunk = tl.load(group_index + i_g) * GROUP
    i_first = tl.load(cu_seqlens + i_s) + i_first_chunk * BT
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = tl.minimum(tl.cdiv(num_rows, BT), GROUP)
    i_slot = tl.load(chunk_offsets + i_s) + i_first_chunk

    o_t = tl.arange(0, BT)
    o_k = i_kb * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    i_state = (i_g.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    low = v.dtype.element_ty
    i_previous = tl.broadcast_to(tl.maximum(o_t - 1, 0)[:, None], [BT, BK])

    b_dS = tl.load(d_checkpoints + i_state).to(tl.float32)  # [BK, V]
    for i_back in range(0, num_chunks):
        i_t = num_chunks - 1 - i_back
        b_S = tl.load(checkpoints + i_state).to(tl.float32)  # [BK, V]
        for i in range(0, i_t):  # these chunks are whole
            p_rows = (i_first + i * BT).to(tl.int64) * H + i_h
            b_k_earlier = tl.load(k_decayed + p_rows * K + o_tk)  # [BT, BK]
            b_v_earlier = tl.load(v + p_rows * V + o_tv)  # [BT, V]
            b_S = tl.load(chunk_decay + ((i_slot + i).to(tl.int64) * H + i_h) * K + o_k)[:, None] * b_S
            b_S += tl.dot(tl.trans(b_k_earlier), b_v_earlier, input_precision=PRECISION)

        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        m_t = i_t * BT + o_t < num_rows
        m_next = (o_t + 1 < BT) & (i_t * BT + o_t + 1 < num_rows)
        p_tk = rows * K + o_tk
        b_decay = tl.load(chunk_decay + ((i_slot + i_t).to(tl.int64) * H + i_h) * K + o_k)  # [BK]
        b_g = tl.load(g + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_next = tl.load(g + p_tk + H * K, mask=m_next[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        b_dq = tl.dot(b_do, tl.trans(b_S.to(low)), input_precision=PRECISION)
        b_dq = scale * exp(tl.cumsum(b_g, 0)) * b_dq
        b_dk = tl.dot(b_v, tl.trans(b_dS.to(low)), input_precision=PRECISION)
        b_dk = exp(tl.cumsum(b_next, 0, reverse=True)) * b_dk
        tl.store(dq + p_tk, b_dq.to(low), mask=m_t[:, None])
        tl.store(dk + p_tk, b_dk.to(low), mask=m_t[:, None])

        b_dg = tl.cumsum(tl.load(q + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32) * b_dq, 0, reverse=True)
        # The last row's key reaches the end without decay: it must be left out, and cannot be taken off again.
        b_to_end = tl.load(k + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32) * b_dk
        b_to_end = tl.where(o_t[:, None] > 0, tl.gather(b_to_end, i_previous, 0), 0.0)
        b_dg += tl.cumsum(b_to_end, 0) + (b_decay * tl.sum(b_S * b_dS, 1))[None, :]
        tl.store(dg + p_tk, b_dg, mask=m_t[:, None])

        b_dS = b_decay[:, None] * b_dS
        b_q = tl.load(q_decayed + p_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_dS += tl.dot(tl.trans(b_q), b_do, input_precision=PRECISION)


def run_reverse_recurrence(q_decayed, k_decayed, chunk_decay, scores, do, cu_seqlens, table: ChunkTable,
                           groups: ChunkTable, checkpoints, d_final_state, d_initial_state):  # fmt: skip
    """Walks every segment backwards, and fills d_initial_state where it is given.

    Returns dv [R, H, V], and dS after every group [M, H, K, V].
    """
    (_, heads, key_size), value_size = k_decayed.shape, do.shape[2]
    dv, d_checkpoints = torch.empty_like(do), torch.empty_like(checkpoints)
    launch = launch_for("recurrence", do, value_size, key_size)
    _reverse_recurrence_kernel[((cu_seqlens.shape[0] - 1) * heads * (value_size // launch.tile),)](
        q_decayed=q_decayed,
        k_decayed=k_decayed,
        chunk_decay=chunk_decay,
        scores=scores,
        do=do,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        group_offsets=groups.offsets,
        d_final_state=d_final_state,
        d_initial_state=d_initial_state,
        d_checkpoints=d_checkpoints,
        dv=dv,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        GROUP=GROUP,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=d_initial_state is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dv, d_checkpoints


def run_state_gradients(q, k, v, g, q_decayed, k_decayed, chunk_decay, do, checkpoints, d_checkpoints, cu_seqlens,
                        table: ChunkTable, groups: ChunkTable, scale):  # fmt: skip
    """What the states owe to dq and dk [R, H, K] in q's type, and to dg [R, H, K] float32."""
    (_, heads, key_size), value_size = k.shape, v.shape[2]
    dq, dk, dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g, dtype=torch.float32)
    launch = launch_for("state_gradients", v, key_size, value_size)
    _state_gradients_kernel[(groups.segment.shape[0] * heads * (key_size // launch.tile),)](
        q=q,
        k=k,
        v=v,
        g=g,
        q_decayed=q_decayed,
        k_decayed=k_decayed,
        chunk_decay=chunk_decay,
        do=do,
        checkpoints=checkpoints,
        d_checkpoints=d_checkpoints,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        group_segment=groups.segment,
        group_index=groups.index,
        dq=dq,
        dk=dk,
        dg=dg,
        scale=scale,
        num_segments=cu_seqlens.shape[0] - 1,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=launch.tile,
        GROUP=GROUP,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dq, dk, dg
