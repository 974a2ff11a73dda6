"""Gated linear attention: what a chunk computes from its own rows, without the state.

Shape legend: rows R, segments S, heads H, key size K, chunk length BT, chunk slots N.

Sums of g over rows a < t <= b, channel by channel, are written g(a, b]; start is the row before the chunk's first row,
end its last row:

    (1)  P_ij = scale * sum_K q_i k_j exp(g(j, i])       j <= i
    (2)  q~_i = scale * q_i exp(g(start, i])
    (3)  k~_j = k_j exp(g(j, end])
    (4)  decays = exp(g(start, end])

P has a decay for every pair of rows and every channel. Where no channel decays by more than 2^-LIMIT in a chunk, that
decay is a product of two numbers, each of one row, and P is one matrix product:

    (5)  exp(g(j, i]) = exp(c_i) exp(-c_j),    c_i = g(start, i] - g(start, end] / 2

|c| is at most LIMIT / 2 in exponents of two: 2^60 is far below the largest number of bfloat16, the type of this product
for 16-bit inputs. Such a chunk of a head is called whole. `block_scores` has the others.

Every large matrix product takes its left operand from memory as it was stored, never from registers: ptxas of CUDA 12.8
and 12.9 miscompiles Hopper's asynchronous products with a left operand in registers (Triton pull request 11781). So q~,
k~ and P go through memory. The product (5) is synchronous: a program has fewer warps than an asynchronous one takes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import ChunkLocal, Inputs
from mom_layers.recur.channel_decay.triton.block_scores import block_scores
from mom_layers.recur.channel_decay.triton.blocks import PRECISION, exponents
from mom_layers.recur.channel_decay.triton.launches import launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import chunk_of_program

LIMIT = tl.constexpr(120.0)
# For float32 inputs, whose c of this size has an error of 1e-6.
EXACT_LIMIT = tl.constexpr(20.0)


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_local_kernel(
    q,
    k,
    g,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    q_decayed,
    k_decayed,
    decays,
    whole_chunks,
    scores,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SCORES: tl.constexpr,
):
    """Equations (2) to (4) of one chunk and head, and whether they are whole; with SCORES also (1) as (5) has it, which
    is right where they are whole."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_chunk = i_c.to(tl.int64) * H + i_h
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = (o_t < last)[:, None]
    m_next = ((o_t + 1 < BT) & (o_t + 1 < last))[:, None]
    low = q_decayed.dtype.element_ty
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    pair = tl.float32 if EXACT else tl.bfloat16

    b_P = tl.zeros([BT, BT], tl.float32)
    b_least = tl.zeros([BK], tl.float32)  # the chunk's sums of g, the least over all columns so far
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        p_tk = rows * K + o_t[:, None] * (H * K) + o_k[None, :]
        b_q = tl.load(q + p_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
        b_k = tl.load(k + p_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
        b_g = exponents(tl.load(g + p_tk, mask=m_t, other=0.0))  # [BT, BK]
        b_G = tl.cumsum(b_g, 0)
        b_total = tl.sum(b_g, 0)
        b_least = tl.minimum(b_least, b_total)
        if EXACT:
            # Sums of the rows themselves: a difference of two longer sums loses digits of a small one.
            b_next = exponents(tl.load(g + H * K + p_tk, mask=m_next, other=0.0))  # [BT, BK]
            b_after = tl.cumsum(b_next, 0, reverse=True)
        else:
            b_after = b_total[None, :] - b_G
        tl.store(q_decayed + p_tk, (scale * b_q * tl.exp2(b_G)).to(low), mask=m_t)
        tl.store(k_decayed + p_tk, (b_k * tl.exp2(b_after)).to(low), mask=m_t)
        tl.store(decays + i_chunk * K + o_k, tl.exp2(b_total))
        if SCORES:
            b_c = b_G - 0.5 * b_total[None, :]
            b_q_pair = (b_q * tl.exp2(b_c)).to(pair)
            b_k_pair = (b_k * tl.exp2(-b_c)).to(pair)
            b_P = tl.dot(b_q_pair, tl.trans(b_k_pair), b_P, input_precision=PRECISION)

    whole = tl.min(b_least, 0) >= -(EXACT_LIMIT if EXACT else LIMIT)
    tl.store(whole_chunks + i_chunk, whole.to(tl.int32))
    if SCORES:
        p_P = scores + i_chunk * BT * BT + o_t[:, None] * BT + o_t[None, :]
        tl.store(p_P, tl.where(o_t[:, None] >= o_t[None, :], scale * b_P, 0.0).to(low))


def chunk_local(
    *, inputs: Inputs, chunks: Chunks, scores: torch.Tensor | None = None, launches_for=launches_for
) -> ChunkLocal:
    """Equations (1) to (4) of every chunk.

    Args:
        inputs, chunks: of the same rows.
        scores: P of an earlier call; computed when absent.
        launches_for: a kernel set's, with fields as the general set's.
    """
    q, heads, k_dim, slots = inputs.q, inputs.num_heads, inputs.k_dim, chunks.num_slots
    launches = launches_for(q.device, q.dtype, k_dim, inputs.v_dim)
    q_decayed, k_decayed = torch.empty_like(q), torch.empty_like(inputs.k)
    decays = torch.empty(slots, heads, k_dim, dtype=torch.float32, device=q.device)
    whole_chunks = torch.empty(slots, heads, dtype=torch.int32, device=q.device)
    compute_scores = scores is None
    if compute_scores:
        scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
    launch = launches.chunk_local
    _chunk_local_kernel[(slots * heads,)](
        q=q,
        k=inputs.k,
        g=inputs.g,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        q_decayed=q_decayed,
        k_decayed=k_decayed,
        decays=decays,
        whole_chunks=whole_chunks,
        scores=scores,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        BT=CHUNK,
        BK=launch.tile,
        SCORES=compute_scores,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    if compute_scores:
        block_scores(inputs, chunks, whole_chunks, scores, launches.block_scores)
    return ChunkLocal(q_decayed, k_decayed, decays, whole_chunks, scores)
