"""What a chunk computes from its own rows, without the state.

Sums of g over rows a < t <= b, channel by channel, are written g(a, b]; start is the row before the chunk's first row,
end its last row; E_i = erase_i k_i:

    (1)  P_ij = scale * sum_K q_i k_j exp(g(j, i])       j <= i
    (2)  A_ij = sum_K E_i k_j exp(g(j, i])               j < i
    (3)  X = (I + A)^-1 A
    (4)  q~_i = scale * q_i exp(g(start, i])     E~_i = E_i exp(g(start, i])
    (5)  k~_j = k_j exp(g(j, end])
    (6)  decays = exp(g(start, end])

`levels` says how P and A become matrix products. The terms j = i of P have no decay, and are summed apart.

Every large matrix product of this family takes its left operand from memory as the operand was stored, never from
registers: ptxas of CUDA 12.8 and 12.9 miscompiles Hopper's asynchronous products with a left operand in registers
(Triton pull request 11781). So the keys of a level go through memory. The sums of `levels` are products of fewer than
64 rows, which are synchronous.

Shape legend: rows R, segments S, heads H, key size K, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.channel_delta.tensors import ChunkLocal, Inputs
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
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.solve_triton import solve_chunks


@triton.jit
def load_erase(erase, rows, o_t, o_tk, m_t, m_tk, H: tl.constexpr, K: tl.constexpr, ERASE_CHANNELS: tl.constexpr):
    """erase of the chunk's rows, [BT, 1] or [BT, BK], float32; of the rows and channels that exist."""
    if ERASE_CHANNELS:
        return tl.load(erase + rows * K + o_tk, mask=m_tk, other=0.0).to(tl.float32)
    else:
        return tl.load(erase + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_local_kernel(
    q,
    k,
    g,
    erase,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    q_decayed,
    k_decayed,
    erase_decayed,
    decays,
    scores,
    key_scores,
    whole_chunks,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ERASE_CHANNELS: tl.constexpr,
    SCORES: tl.constexpr,
    LEVELS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Equations (1), (2) and (4) to (6) of one chunk and head; without SCORES (4) to (6).

    Without LEVELS it takes P and A on the first level alone, and stores whether that level is whole for all channels;
    with LEVELS it computes the other chunks anew.
    """
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_chunk = i_c.to(tl.int64) * H + i_h
    if LEVELS:
        if tl.load(whole_chunks + i_chunk) != 0:
            return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    o_t = tl.arange(0, BT)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_row
    m_t = o_t < num_rows
    rows = i_row.to(tl.int64) * H + i_h
    low = q_decayed.dtype.element_ty
    pair = tl.float32 if EXACT else tl.bfloat16
    k_pair = k_decayed.to(tl.pointer_type(pair))

    if SCORES:
        # Both transposed.
        b_P = tl.zeros([BT, BT], tl.float32)
        b_A = tl.zeros([BT, BT], tl.float32)
        b_diagonal = tl.zeros([BT], tl.float32)
    all_whole = i_h * 0 + 1
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        o_tk = o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_g = tl.load(g + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_E = b_k * load_erase(erase, rows, o_t, o_tk, m_t, m_t[:, None], H, K, ERASE_CHANNELS)  # [BT, BK]

        b_G = tl.cumsum(b_g, 0)
        b_total = tl.sum(b_g, 0)
        b_c = first_sums(b_g, b_G)
        whole = largest(tl.abs(b_c)) <= (EXACT_LIMIT if EXACT else LIMIT)
        b_after = b_total[None, :] - b_G
        if not whole:
            all_whole = all_whole * 0
            b_after = sums_after(g + rows * K, o_tk, o_t, o_k < K, num_rows, H * K)

        # (1) and (2). k exp(-c) goes through the memory of k~.
        if SCORES:
            b_diagonal += tl.sum(b_q * b_k, 1)
        if SCORES and not LEVELS:
            if whole:
                b_from, b_to = exp(b_c), exp(-b_c)
                tl.store(k_pair + rows * K + o_tk, (b_k * b_to).to(pair), mask=m_t[:, None])
                tl.debug_barrier()
                b_k_pair = tl.load(k_pair + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
                b_P += tl.dot(b_k_pair, tl.trans((b_q * b_from).to(pair)), input_precision=PRECISION)
                b_A += tl.dot(b_k_pair, tl.trans((b_E * b_from).to(pair)), input_precision=PRECISION)
                tl.debug_barrier()
        if SCORES and LEVELS:
            g_max = largest(tl.abs(b_g))
            level = FIRST_LEVEL + i_k * 0
            while level > 0:
                b_c = border_sums(b_g, level)
                b_from, b_to = level_factors(b_c, o_t, level, whole)
                tl.store(k_pair + rows * K + o_tk, (b_k * b_to).to(pair), mask=m_t[:, None])
                tl.debug_barrier()
                b_k_pair = tl.load(k_pair + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
                b_new_P = tl.dot(b_k_pair, tl.trans((b_q * b_from).to(pair)), input_precision=PRECISION)
                b_new_A = tl.dot(b_k_pair, tl.trans((b_E * b_from).to(pair)), input_precision=PRECISION)
                _, m_tt = level_pairs(o_t, level)
                b_P += tl.where(m_tt, b_new_P, 0.0)
                b_A += tl.where(m_tt, b_new_A, 0.0)
                level = tl.where(whole, 0, level - 1)
                whole = level_is_whole(tl.maximum(level, 1), g_max, EXACT)
                tl.debug_barrier()

        # (4) to (6).
        b_from_start = exp(b_G)
        tl.store(q_decayed + rows * K + o_tk, (scale * b_q * b_from_start).to(low), mask=m_t[:, None])
        tl.store(erase_decayed + rows * K + o_tk, (b_E * b_from_start).to(low), mask=m_t[:, None])
        tl.store(k_decayed + rows * K + o_tk, (b_k * exp(b_after)).to(low), mask=m_t[:, None])
        tl.store(decays + i_chunk * K + o_k, exp(b_total))

    if not LEVELS:
        tl.store(whole_chunks + i_chunk, all_whole)
    if SCORES:
        o_tt = o_t[:, None] + o_t[None, :] * BT
        later = o_t[:, None] < o_t[None, :]
        b_P = tl.where(later, b_P, tl.where(o_t[:, None] == o_t[None, :], b_diagonal[None, :], 0.0))
        tl.store(scores + i_chunk * BT * BT + o_tt, (scale * b_P).to(low))
        tl.store(key_scores + i_chunk * BT * BT + o_tt, tl.where(later, b_A, 0.0))


def chunk_local(
    *,
    inputs: Inputs,
    chunks: Chunks,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
    launches_for=launches_for,
) -> ChunkLocal:
    """Equations (1) to (6) of every chunk.

    Args:
        inputs, chunks: of the same rows.
        known: X and P of an earlier call; computed when absent.
        launches_for: a kernel set's, with fields as the general set's.
    """
    q, heads, k_dim, slots = inputs.q, inputs.num_heads, inputs.k_dim, chunks.num_slots
    decayed = [torch.empty_like(q) for _ in range(3)]
    decays = torch.empty(slots, heads, k_dim, dtype=torch.float32, device=q.device)
    scores = key_scores = None
    if known is None:
        scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
        key_scores = torch.empty_like(scores, dtype=torch.float32)
    whole_chunks = torch.empty(slots, heads, dtype=torch.int32, device=q.device)
    # The tiles do not depend on V: K stands for V.
    launches = launches_for(q.device, q.dtype, k_dim, k_dim)
    for levels in (False, True) if known is None else (False,):
        launch = launches.levels if levels else launches.chunk_local
        _chunk_local_kernel[(slots * heads,)](
            q=q,
            k=inputs.k,
            g=inputs.g,
            erase=inputs.erase,
            cu_seqlens=chunks.cu_seqlens,
            chunk_segment=chunks.table.segment,
            chunk_index=chunks.table.index,
            q_decayed=decayed[0],
            k_decayed=decayed[1],
            erase_decayed=decayed[2],
            decays=decays,
            scores=scores,
            key_scores=key_scores,
            whole_chunks=whole_chunks,
            scale=inputs.scale,
            num_segments=chunks.num_segments,
            H=heads,
            K=k_dim,
            BT=CHUNK,
            BK=launch.tile,
            ERASE_CHANNELS=inputs.erases_channels,
            SCORES=known is None,
            LEVELS=levels,
            EXACT=q.dtype == torch.float32,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    if known is None:
        known = solve_chunks(key_scores, None, chunks, q.dtype), scores
    return ChunkLocal(*decayed, decays, whole_chunks, *known)
