"""Backward kernels of the gated delta rule; names and the chunk's equations as in the forward file.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N.

With dS the gradient of the state after the chunk, a chunk of the reverse recurrence is

    z = scale * P^T do + exp(G_last - G) * (k dS)         gradient of beta * e
    y = z - X^T (beta * z)                                the transposed solve: gradient of beta * r
    dS <- exp(G_last) dS + q^T (scale * exp(G) * do) - k^T (exp(G) * beta * y)

and then, from e, y, the states S at the chunks' starts and the gradients dS at their ends,

    dv = beta * y        dbeta = sum_V y * e
    dP = lower(scale * (do e^T) * beta_j * exp(G_i - G_j))
    dN = strictly_lower(-(y e^T) * beta_i * beta_j * exp(G_i - G_j))
    dq = dP k + scale * exp(G) * (do S^T)
    dk = dP^T q + dN k + dN^T k - exp(G) * beta * (y S^T) + exp(G_last - G) * beta * (e dS^T)

g_t takes part in every exp(G_i - G_j) with j < t <= i, exp(G_i) with t <= i, exp(G_last - G_i) with i < t, and
exp(G_last). The gradient of an exponent is that of its exponential times the exponential: q * dq or k * dk summed over
K, term by term. Terms without decay (i = j) are left out and not cancelled: under strong decay they would bury dg.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.ops.chunk_table import CHUNK, ChunkTable
from mom_layers.ops.gated_delta_rule_triton_forward import PRECISION, decay_between
from mom_layers.ops.gated_delta_rule_triton_launch import launch_for, recurrence_launch


@triton.jit
def _reverse_recurrence_kernel(
    q,
    k,
    beta,
    gates,
    solved,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    d_final_state,
    d_initial_state,
    d_states,
    d_errors,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    HAS_D_FINAL_STATE: tl.constexpr,
    STORE_D_INITIAL_STATE: tl.constexpr,
):
    """BV columns of dS along one segment and head, from its last chunk to its first. Stores dS and y."""
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
    low = k.dtype.element_ty

    if HAS_D_FINAL_STATE:
        b_dS = tl.load(d_final_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_dS = tl.zeros([K, BV], tl.float32)
    for i_back in range(0, num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = i_t * BT + o_t < num_rows
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_first_chunk + i_t).to(tl.int64) * H + i_h
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(gates + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(gates + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(gates + i_chunk * 2 * BT + BT - 1)
        b_X = tl.load(solved + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]

        b_dS_low = b_dS.to(low)
        tl.store(d_states + i_chunk * K * V + o_kv, b_dS_low)
        b_z = scale * tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        b_z += b_to_end * tl.dot(b_k, b_dS_low, input_precision=PRECISION)
        b_y = b_z - tl.dot(tl.trans(b_X), (b_beta * b_z).to(low), input_precision=PRECISION)
        tl.store(d_errors + rows * V + o_tv, b_y.to(low), mask=m_t[:, None])

        b_dS = chunk_decay * b_dS
        b_k_side = (-b_from_start * b_beta * b_y).to(low)
        b_dS += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_q_side = (scale * b_from_start * b_do.to(tl.float32)).to(low)
        b_dS += tl.dot(tl.trans(b_q), b_q_side, input_precision=PRECISION)
    if STORE_D_INITIAL_STATE:
        tl.store(d_initial_state + i_state + o_kv, b_dS)


@triton.jit(do_not_specialize=["num_segments"])
def _score_gradients_kernel(
    g,
    beta,
    scores,
    errors,
    d_errors,
    do,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    d_mixing,
    d_scores,
    d_decay,
    dbeta,
    scale,
    num_segments,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """dP, dN, dbeta and what g owes to P, of one chunk and head.

    dP and dN go through memory on purpose: their transposes are left operands of the next kernel's products.
    """
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_s = tl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h

    b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    b_g = tl.load(g + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    b_dP = tl.zeros([BT, BT], tl.float32)
    b_dN = tl.zeros([BT, BT], tl.float32)
    b_dbeta = tl.zeros([BT], tl.float32)
    for i_v in range(0, V, BV):
        o_tv = o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_e = tl.load(errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_dP += tl.dot(b_do, tl.trans(b_e), input_precision=PRECISION)
        b_dN += tl.dot(b_y, tl.trans(b_e), input_precision=PRECISION)
        b_dbeta += tl.sum(b_y.to(tl.float32) * b_e.to(tl.float32), 1)

    below = o_t[:, None] > o_t[None, :]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    b_between = decay_between(b_g)
    b_P = tl.load(scores + i_chunk * BT * BT + o_tt).to(tl.float32)  # [BT, BT]
    b_dP = b_dP * (scale * b_beta)[None, :]
    b_exponent = tl.where(below, b_dP * b_P, 0.0)
    b_d_decay = tl.sum(b_exponent, 1) - tl.sum(b_exponent, 0)
    b_dP = b_dP * b_between
    b_dN = tl.where(below, b_dN * b_between * b_beta[:, None] * -b_beta[None, :], 0.0)
    tl.store(d_scores + i_chunk * BT * BT + o_tt, b_dP.to(d_scores.dtype.element_ty))
    tl.store(d_mixing + i_chunk * BT * BT + o_tt, b_dN.to(d_mixing.dtype.element_ty))
    tl.store(d_decay + i_chunk * BT + o_t, b_d_decay)
    tl.store(dbeta + rows + o_t * H, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["num_segments"])
def _query_key_gradients_kernel(
    q,
    k,
    beta,
    gates,
    errors,
    d_errors,
    do,
    states,
    d_states,
    d_mixing,
    d_scores,
    d_decay,
    cu_seqlens,
    chunk_segment,
    chunk_index,
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
    BV: tl.constexpr,
):
    """dq, dk and dg of one chunk and head, BK columns of q and k at a time; then d_errors turns from y into dv."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_s = tl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h
    o_tt = o_t[:, None] * BT + o_t[None, :]

    b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
    b_from_start = tl.load(gates + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
    b_to_end = tl.load(gates + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
    chunk_decay = tl.load(gates + i_chunk * 2 * BT + BT - 1)
    b_dG = tl.load(d_decay + i_chunk * BT + o_t)  # [BT]
    b_d_to_end = tl.zeros([BT], tl.float32)
    b_d_chunk_decay = tl.zeros([BK], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_from_state_q = tl.zeros([BT, BK], tl.float32)
        b_from_state_k = tl.zeros([BT, BK], tl.float32)
        b_to_state_k = tl.zeros([BT, BK], tl.float32)
        for i_v in range(0, V, BV):
            o_v = i_v + tl.arange(0, BV)
            o_tv = o_t[:, None] * (H * V) + o_v[None, :]
            o_kv = o_k[:, None] * V + o_v[None, :]
            b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
            b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
            b_e = tl.load(errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
            b_S = tl.load(states + i_chunk * K * V + o_kv)  # [BK, BV]
            b_dS = tl.load(d_states + i_chunk * K * V + o_kv)  # [BK, BV]
            b_from_state_q += tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
            b_from_state_k += tl.dot(b_y, tl.trans(b_S), input_precision=PRECISION)
            b_to_state_k += tl.dot(b_e, tl.trans(b_dS), input_precision=PRECISION)
            b_d_chunk_decay += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)

        o_tk = o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_dP = tl.load(d_scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_dN = tl.load(d_mixing + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_dq = b_from_state_q * (b_from_start * scale)
        b_dG += tl.sum(b_q.to(tl.float32) * b_dq, 1)
        b_dq += tl.dot(b_dP, b_k, input_precision=PRECISION)
        tl.store(dq + rows * K + o_tk, b_dq.to(dq.dtype.element_ty), mask=m_t[:, None])

        b_to_state_k = b_to_state_k * (b_to_end * b_beta)
        b_d_to_end += tl.sum(b_k.to(tl.float32) * b_to_state_k, 1)
        b_dk = b_from_state_k * (-b_from_start * b_beta) + tl.dot(b_dN, b_k, input_precision=PRECISION)
        b_dG += tl.sum(b_k.to(tl.float32) * b_dk, 1)
        b_from_later = tl.dot(tl.trans(b_dN), b_k, input_precision=PRECISION)
        b_dG -= tl.sum(b_k.to(tl.float32) * b_from_later, 1)
        b_dk += b_to_state_k + b_from_later
        b_dk += tl.dot(tl.trans(b_dP), b_q, input_precision=PRECISION)
        tl.store(dk + rows * K + o_tk, b_dk.to(dk.dtype.element_ty), mask=m_t[:, None])

    b_dg = tl.sum(tl.where(o_t[:, None] >= o_t[None, :], b_dG[:, None], b_d_to_end[:, None]), 0)
    b_dg += chunk_decay * tl.sum(b_d_chunk_decay, 0)
    tl.store(dg + rows + o_t * H, b_dg.to(dg.dtype.element_ty), mask=m_t)

    # dv = beta * y takes y's place: these rows and this head are read by no other program.
    tl.debug_barrier()
    for i_v in range(0, V, BV):
        o_tv = o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_dv = (b_beta * b_y.to(tl.float32)).to(d_errors.dtype.element_ty)
        tl.store(d_errors + rows * V + o_tv, b_dv, mask=m_t[:, None])


def run_reverse_recurrence(q, k, beta, gates, solved, scores, do, cu_seqlens, table: ChunkTable, scale, d_final_state,
                           d_initial_state, d_states, d_errors):  # fmt: skip
    """Walks every segment backwards; fills d_states [N, H, K, V], d_errors [R, H, V], and d_initial_state if given."""
    (_, heads, key_size), value_size = k.shape, do.shape[2]
    launch = recurrence_launch(k, value_size)
    _reverse_recurrence_kernel[((cu_seqlens.shape[0] - 1) * heads * (value_size // launch.tile),)](
        q=q,
        k=k,
        beta=beta,
        gates=gates,
        solved=solved,
        scores=scores,
        do=do,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        d_final_state=d_final_state,
        d_initial_state=d_initial_state,
        d_states=d_states,
        d_errors=d_errors,
        scale=scale,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=d_initial_state is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def run_local_gradients(q, k, g, beta, gates, scores, errors, d_errors, states, d_states, do, cu_seqlens,
                        table: ChunkTable, scale):  # fmt: skip
    """dq, dk, dg and dbeta from what the two recurrences stored; d_errors becomes dv."""
    (_, heads, key_size), value_size = k.shape, do.shape[2]
    slots = table.segment.shape[0]
    num_segments = cu_seqlens.shape[0] - 1
    d_scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=k.dtype, device=k.device)
    d_mixing = torch.empty_like(d_scores)
    d_decay = torch.empty(slots, heads, CHUNK, dtype=torch.float32, device=k.device)
    dq, dk, dg, dbeta = (torch.empty_like(x) for x in (q, k, g, beta))
    launch = launch_for("score_gradients", k)
    _score_gradients_kernel[(slots * heads,)](
        g=g,
        beta=beta,
        scores=scores,
        errors=errors,
        d_errors=d_errors,
        do=do,
        cu_seqlens=cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        d_mixing=d_mixing,
        d_scores=d_scores,
        d_decay=d_decay,
        dbeta=dbeta,
        scale=scale,
        num_segments=num_segments,
        H=heads,
        V=value_size,
        BT=CHUNK,
        BV=min(launch.tile, value_size),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    launch = launch_for("query_key_gradients", k)
    _query_key_gradients_kernel[(slots * heads,)](
        q=q,
        k=k,
        beta=beta,
        gates=gates,
        errors=errors,
        d_errors=d_errors,
        do=do,
        states=states,
        d_states=d_states,
        d_mixing=d_mixing,
        d_scores=d_scores,
        d_decay=d_decay,
        cu_seqlens=cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        dq=dq,
        dk=dk,
        dg=dg,
        scale=scale,
        num_segments=num_segments,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=min(launch.tile, key_size),
        BV=min(launch.tile, value_size),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dq, dk, dg, dbeta
