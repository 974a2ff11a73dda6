"""The gradients of q, k, g and erase, of BK key channels of one chunk at a time.

Names and sums of g as in the other files. With S the state at the chunk's start, dS the gradient of the state after the
chunk, and E_i = erase_i k_i, what the states give is

    (18)  dq_i = scale * exp(g(start, i]) * (do S^T)_i          dE_i = -exp(g(start, i]) * (y S^T)_i
    (19)  dk'_j = exp(g(j, end]) * (e dS^T)_j

and what the chunk's rows give each other, over pairs j < i, level by level as `levels` says,

    (20)  dq_i += sum_j dP_ij k_j exp(g(j, i])                  dE_i += sum_j dA_ij k_j exp(g(j, i])
    (21)  dk_j = sum_i (dP_ij q_i + dA_ij E_i) exp(g(j, i])
    (22)  dg_t = sum_{i >= t} (q_i dq_i + E_i dE_i - k_i dk_i) + sum_{j < t} k_j dk'_j + decays * sum_V S dS

Last come the terms without decay, which have no part in (22): in (22) these terms would cancel up to rounding errors,
which are larger than dg under strong decay.

    (23)  dq_i += dP_ii k_i        dk_i += dk'_i + dP_ii q_i + erase_i dE_i
    (24)  d_erase = k dE, summed over K where erase is a number a head

Shape legend: rows R, heads H, key size K, value size V, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.channel_delta.tensors import ErrorRows, Inputs, ScoreGradients
from mom_layers.recur.channel_delta.triton.chunk_local import load_erase
from mom_layers.recur.channel_delta.triton.launches import launches_for
from mom_layers.recur.channel_delta.triton.levels import (
    EXACT_LIMIT,
    FIRST_LEVEL,
    LIMIT,
    PRECISION,
    border_sums,
    first_sums,
    largest,
    level_factors,
    level_is_whole,
    level_pairs,
    sums_after,
)
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import tile_of_chunk
from mom_layers.recur.tiles_triton import finished, has_asynchronous_products, tile_mask


@triton.jit(do_not_specialize=["num_segments"])
def _row_gradients_kernel(
    q,
    k,
    g,
    erase,
    errors,
    d_errors,
    do,
    decays,
    states,
    d_states,
    d_scores,
    d_key_scores,
    whole_chunks,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    dq,
    dk,
    dg,
    d_erase,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ERASE_CHANNELS: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
    ASYNCHRONOUS: tl.constexpr,
):
    """Equations (18) to (24) for BK channels of one chunk and head: with LEVELS of the chunks that are not whole on the
    first level, without of the others."""
    TILES: tl.constexpr = (K + BK - 1) // BK
    VALUES: tl.constexpr = (V + BV - 1) // BV * BV
    i_kb, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, TILES)
    if i_s >= num_segments:
        return
    i_chunk = i_c.to(tl.int64) * H + i_h
    if (tl.load(whole_chunks + i_chunk) == 0) != LEVELS:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    o_k = i_kb * BK + tl.arange(0, BK)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_row
    m_t = o_t < num_rows
    m_tk = tile_mask(m_t, o_k, K, BK * TILES)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    p_dP = d_scores + i_chunk * BT * BT
    p_dA = d_key_scores + i_chunk * BT * BT
    o_tt = o_t[:, None] * BT + o_t[None, :]
    low = q.dtype.element_ty
    pair = d_scores.dtype.element_ty

    # The products of (18) and (19), BV columns at a time, and the sum over V of (22).
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_dE = tl.zeros([BT, BK], tl.float32)
    b_dk_state = tl.zeros([BT, BK], tl.float32)
    b_S_dS = tl.zeros([BK], tl.float32)
    for i_v in range(0, V, BV):
        o_v = i_v + tl.arange(0, BV)
        o_tv = o_t[:, None] * (H * V) + o_v[None, :]
        o_kv = o_k[:, None] * V + o_v[None, :]
        m_tv = tile_mask(m_t, o_v, V, VALUES)
        b_do = tl.load(do + rows * V + o_tv, mask=m_tv, other=0.0)  # [BT, BV]
        b_y = tl.load(d_errors + rows * V + o_tv, mask=m_tv, other=0.0)  # [BT, BV]
        b_e = tl.load(errors + rows * V + o_tv, mask=m_tv, other=0.0)  # [BT, BV]
        if K == BK * TILES and V == VALUES:
            b_S = tl.load(states + i_chunk * K * V + o_kv)  # [BK, BV]
            b_dS = tl.load(d_states + i_chunk * K * V + o_kv)  # [BK, BV]
        else:
            m_kv = tile_mask(o_k < K, o_v, V, VALUES)
            b_S = tl.load(states + i_chunk * K * V + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
            b_dS = tl.load(d_states + i_chunk * K * V + o_kv, mask=m_kv, other=0.0)  # [BK, BV]
        b_dq += tl.dot(b_do, tl.trans(b_S), input_precision=PRECISION)
        b_dE += tl.dot(b_y, tl.trans(b_S), input_precision=PRECISION)
        b_dk_state += tl.dot(b_e, tl.trans(b_dS), input_precision=PRECISION)
        b_dq, b_dE = finished(b_dq, i_v, ASYNCHRONOUS), finished(b_dE, i_v, ASYNCHRONOUS)
        b_dk_state = finished(b_dk_state, i_v, ASYNCHRONOUS)
        b_S_dS += tl.sum(b_S.to(tl.float32) * b_dS.to(tl.float32), 1)

    # (18), (19), and their part of (22), whose sum over earlier rows leaves the row itself out: the terms move down by
    # a row before they are summed.
    b_q = tl.load(q + rows * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)  # [BT, BK]
    b_k = tl.load(k + rows * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)  # [BT, BK]
    b_g = tl.load(g + rows * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)  # [BT, BK]
    b_erase = load_erase(erase, rows, o_t, o_tk, m_t, m_tk, H, K, ERASE_CHANNELS)
    b_E = b_erase * b_k
    b_G = tl.cumsum(b_g, 0)
    b_c = first_sums(b_g, b_G)
    if LEVELS:
        whole = largest(tl.abs(b_c)) <= (EXACT_LIMIT if EXACT else LIMIT)
        b_after = sums_after(g + rows * K, o_tk, o_t, o_k < K, num_rows, H * K)
    else:
        b_after = tl.sum(b_g, 0)[None, :] - b_G
    b_from_start = exp(b_G)
    b_dq = scale * b_from_start * b_dq
    b_dE = -b_from_start * b_dE
    b_dk_state = exp(b_after) * b_dk_state
    i_previous = tl.broadcast_to(tl.maximum(o_t - 1, 0)[:, None], [BT, BK])
    b_dg = tl.where(o_t[:, None] > 0, tl.gather(b_k * b_dk_state, i_previous, 0), 0.0)
    b_decay = tl.load(decays + i_chunk * K + o_k, mask=o_k < K, other=0.0)
    b_dg = tl.cumsum(b_dg, 0) + (b_decay * b_S_dS)[None, :]

    b_exponent = b_q * b_dq + b_E * b_dE

    # (20) and (21), and their part of (22): both sums over a pair take the same rounded factors, so that pairs of which
    # both rows are in the sums of (22) cancel there.
    b_dk = tl.zeros([BT, BK], tl.float32)
    g_max = largest(tl.abs(b_g))
    level = FIRST_LEVEL + i_kb * 0
    while level > 0:
        if LEVELS:
            b_c = border_sums(b_g, level)
            b_from, b_to = level_factors(b_c, o_t, level, whole)
            m_tt, _ = level_pairs(o_t, level)
        else:
            b_from, b_to = exp(b_c), exp(-b_c)
            m_tt = o_t[:, None] > o_t[None, :]
        b_dP = tl.load(p_dP + o_tt, mask=m_tt, other=0.0)  # [BT, BT]
        b_dA = tl.load(p_dA + o_tt, mask=m_tt, other=0.0)  # [BT, BT]
        b_q_pair, b_E_pair = (b_q * b_from).to(pair), (b_E * b_from).to(pair)
        b_k_pair = (b_k * b_to).to(pair)
        b_new = tl.dot(b_dP, b_k_pair, input_precision=PRECISION)
        b_dq += b_from * b_new
        b_exponent += b_q_pair.to(tl.float32) * b_new
        b_new = tl.dot(b_dA, b_k_pair, input_precision=PRECISION)
        b_dE += b_from * b_new
        b_exponent += b_E_pair.to(tl.float32) * b_new
        b_new = tl.dot(tl.trans(b_dP), b_q_pair, input_precision=PRECISION)
        b_new += tl.dot(tl.trans(b_dA), b_E_pair, input_precision=PRECISION)
        b_dk += b_to * b_new
        b_exponent -= b_k_pair.to(tl.float32) * b_new
        if LEVELS:
            level = tl.where(whole, 0, level - 1)
            whole = level_is_whole(tl.maximum(level, 1), g_max, EXACT)
        else:
            level = level * 0

    # (22) to (24).
    b_dg += tl.cumsum(b_exponent, 0, reverse=True)
    tl.store(dg + rows * K + o_tk, b_dg, mask=m_tk)
    b_diagonal = tl.load(p_dP + o_t * (BT + 1)).to(tl.float32)[:, None]  # [BT, 1]
    b_dq += b_diagonal * b_k
    b_dk += b_dk_state + b_diagonal * b_q + b_erase * b_dE
    tl.store(dq + rows * K + o_tk, b_dq.to(low), mask=m_tk)
    tl.store(dk + rows * K + o_tk, b_dk.to(low), mask=m_tk)
    if ERASE_CHANNELS:
        tl.store(d_erase + rows * K + o_tk, (b_k * b_dE).to(d_erase.dtype.element_ty), mask=m_tk)
    else:
        tl.store(d_erase + (rows + o_t * H) * TILES + i_kb, tl.sum(b_k * b_dE, 1), mask=m_t)


def row_gradients(
    *,
    inputs: Inputs,
    rows: ErrorRows,
    decays: torch.Tensor,
    whole_chunks: torch.Tensor,
    chunks: Chunks,
    states: torch.Tensor,
    d_states: torch.Tensor,
    score_gradients: ScoreGradients,
    launches_for=launches_for,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations (18) to (24) of every chunk.

    Args:
        inputs, rows, decays, whole_chunks, chunks: of the same rows.
        states: [N, H, K, V], from ``chunk_states``.
        d_states: [N, H, K, V], from ``reverse_recurrence``.
        score_gradients: from ``score_gradients``.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        dq and dk [R, H, K] in q's type, dg [R, H, K] float32, and d_erase in erase's shape and type.
    """
    q, heads, k_dim, v_dim = inputs.q, inputs.num_heads, inputs.k_dim, states.shape[3]
    launches = launches_for(q.device, q.dtype, k_dim, v_dim)
    tile, narrowest = launches.row_gradients.tile, launches.row_gradients.narrowest
    tiles = triton.cdiv(k_dim, tile)
    dq, dk = torch.empty_like(q), torch.empty_like(inputs.k)
    dg = torch.empty_like(inputs.g, dtype=torch.float32)
    if inputs.erases_channels:
        d_erase = torch.empty_like(inputs.erase)
    else:
        d_erase = torch.empty(*inputs.erase.shape, tiles, dtype=torch.float32, device=q.device)
    for levels in (False, True):
        # The number of parts of d_erase is the same for both.
        launch = (launches.levels if levels else launches.row_gradients)._replace(tile=tile)
        _row_gradients_kernel[(chunks.num_slots * heads * tiles,)](
            q=q,
            k=inputs.k,
            g=inputs.g,
            erase=inputs.erase,
            errors=rows.errors,
            d_errors=rows.d_errors,
            do=rows.do,
            decays=decays,
            states=states,
            d_states=d_states,
            d_scores=score_gradients.d_scores,
            d_key_scores=score_gradients.d_key_scores,
            whole_chunks=whole_chunks,
            cu_seqlens=chunks.cu_seqlens,
            chunk_segment=chunks.table.segment,
            chunk_index=chunks.table.index,
            dq=dq,
            dk=dk,
            dg=dg,
            d_erase=d_erase,
            scale=inputs.scale,
            num_segments=chunks.num_segments,
            H=heads,
            K=k_dim,
            V=v_dim,
            BT=CHUNK,
            BK=tile,
            BV=min(launch.loop_tile, max(v_dim, narrowest)),
            ERASE_CHANNELS=inputs.erases_channels,
            LEVELS=levels,
            EXACT=q.dtype == torch.float32,
            ASYNCHRONOUS=has_asynchronous_products(q.device),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    if not inputs.erases_channels:
        d_erase = d_erase.sum(-1).to(inputs.erase.dtype)
    return dq, dk, dg, d_erase
