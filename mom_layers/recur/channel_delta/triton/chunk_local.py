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
def load_erased(erase, b_k, rows, o_t, o_k, m_t, H: tl.constexpr, K: tl.constexpr, ERASE_CHANNELS: tl.constexpr):
    """erase [BT, 1] or [BT, BK], and E = erase k [BT, BK], float32."""
    if ERASE_CHANNELS:
        p_tk = rows * K + o_t[:, None] * (H * K) + o_k[None, :]
        b_erase = tl.load(erase + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32)
    else:
        b_erase = tl.load(erase + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]
    return b_erase, b_erase * b_k


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
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    ERASE_CHANNELS: tl.constexpr,
    SCORES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Equations (1), (2) and (4) to (6) of one chunk and head; without SCORES (4) to (6)."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_row
    m_t = o_t < num_rows
    rows = i_row.to(tl.int64) * H + i_h
    low = q_decayed.dtype.element_ty
    pair = tl.float32 if EXACT else tl.bfloat16
    k_pair = k_decayed.to(tl.pointer_type(pair))

    if SCORES:
        b_P = tl.zeros([BT, BT], tl.float32)
        b_A = tl.zeros([BT, BT], tl.float32)
        b_diagonal = tl.zeros([BT], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_tk = rows * K + o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_k = tl.load(k + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_g = tl.load(g + p_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        _, b_E = load_erased(erase, b_k, rows, o_t, o_k, m_t, H, K, ERASE_CHANNELS)

        b_G = tl.cumsum(b_g, 0)
        b_total = tl.sum(b_g, 0)
        b_c = first_sums(b_g, b_G)
        whole = largest(tl.abs(b_c)) <= (EXACT_LIMIT if EXACT else LIMIT)
        b_after = b_total[None, :] - b_G
        if not whole:
            b_after = sums_after(g, p_tk, o_t, num_rows, H * K)

        if SCORES:
            # (1) and (2), level by level. k exp(-c) goes through the memory of k~.
            b_diagonal += tl.sum(b_q * b_k, 1)
            g_max = largest(tl.abs(b_g))
            level = FIRST_LEVEL + i_k * 0
            known = whole
            while level > 0:
                if not known:
                    b_c = border_sums(b_g, level, EXACT)
                b_from, b_to = level_factors(b_c, o_t, level, whole)
                tl.store(k_pair + p_tk, (b_k * b_to).to(pair), mask=m_t[:, None])
                tl.debug_barrier()
                b_k_pair = tl.load(k_pair + p_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
                b_new_P = tl.dot(b_k_pair, tl.trans((b_q * b_from).to(pair)), input_precision=PRECISION)
                b_new_A = tl.dot(b_k_pair, tl.trans((b_E * b_from).to(pair)), input_precision=PRECISION)
                m_tt = level_pairs(o_t, level)
                b_P += tl.where(m_tt, tl.trans(b_new_P), 0.0)
                b_A += tl.where(m_tt, tl.trans(b_new_A), 0.0)
                level = tl.where(whole, 0, level - 1)
                known = whole & (level < 0)
                whole = level_is_whole(tl.maximum(level, 1), g_max, EXACT)
                tl.debug_barrier()

        # (4) to (6).
        b_from_start = exp(b_G)
        tl.store(q_decayed + p_tk, (scale * b_q * b_from_start).to(low), mask=m_t[:, None])
        tl.store(erase_decayed + p_tk, (b_E * b_from_start).to(low), mask=m_t[:, None])
        tl.store(k_decayed + p_tk, (b_k * exp(b_after)).to(low), mask=m_t[:, None])
        tl.store(decays + i_chunk * K + o_k, exp(b_total))

    if SCORES:
        p_tt = i_chunk * BT * BT + o_t[:, None] * BT + o_t[None, :]
        b_P = scale * tl.where(o_t[:, None] == o_t[None, :], b_diagonal[:, None], b_P)
        tl.store(scores + p_tt, b_P.to(low))
        tl.store(key_scores + p_tt, b_A)


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
    # The tile does not depend on V: K stands for V.
    launch = launches_for(q.device, q.dtype, k_dim, k_dim).chunk_local
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
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        BT=CHUNK,
        BK=launch.tile,
        ERASE_CHANNELS=inputs.erases_channels,
        SCORES=known is None,
        EXACT=q.dtype == torch.float32,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if known is None:
        known = solve_chunks(key_scores, None, chunks, q.dtype), scores
    return ChunkLocal(*decayed, decays, *known)
