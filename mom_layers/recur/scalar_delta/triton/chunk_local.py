"""What a chunk of the gated delta rule computes from its own rows.

With G the sum of g from the chunk's first row on, of one chunk and head:

    (1)  exp(G)    exp(G_last - G)                            the decays from the chunk's start and to its end
    (2)  N = strictly_lower((k k^T) * exp(G_i - G_j))
    (3)  P = lower((q k^T) * exp(G_i - G_j))
    (4)  X = (I + N diag(beta))^-1 N

Storing X, and not the inverse, keeps the identity out of the inputs' type, and the transposed solve of the backward
pass uses X as it is.

Every matrix product of this family takes its left operand from memory as the operand was stored, never from registers:
ptxas of CUDA 12.8 and 12.9 miscompiles Hopper's asynchronous products with a left operand in registers (Triton pull
request 11781, and the cause of issues 640 and 984 of flash-linear-attention).

Shape legend: rows R, segments S, heads H, key size K, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.decays_triton import decay_between
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, Inputs
from mom_layers.recur.scalar_delta.triton.launches import launches_for
from mom_layers.recur.solve_triton import solve_chunks

# Products of float32 inputs are exact in float32: no tf32. Other types ignore this setting.
PRECISION = tl.constexpr("ieee")


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_scores_kernel(
    q,
    k,
    g,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    decays,
    key_scores,
    scores,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Equations (1) to (3) of one chunk and head; N in float32."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h

    # (1): G is summed in float64, see decay_between.
    b_g = tl.load(g + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    b_G = tl.cumsum(b_g.to(tl.float64), 0)
    b_to_end = tl.sum(b_g.to(tl.float64), 0) - b_G
    tl.store(decays + i_chunk * 2 * BT + o_t, tl.exp(b_G.to(tl.float32)))
    tl.store(decays + i_chunk * 2 * BT + BT + o_t, tl.exp(b_to_end.to(tl.float32)))

    # (2) and (3): the products first, BK columns at a time.
    b_N = tl.zeros([BT, BT], tl.float32)
    b_P = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, K, BK):
        o_tk = o_t[:, None] * (H * K) + i_k + tl.arange(0, BK)[None, :]
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_N += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_P += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)

    # Then the decays between the rows.
    b_between = decay_between(b_g)
    b_N = tl.where(o_t[:, None] > o_t[None, :], b_N * b_between, 0.0)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    tl.store(key_scores + i_chunk * BT * BT + o_tt, b_N)
    tl.store(scores + i_chunk * BT * BT + o_tt, (b_P * b_between).to(scores.dtype.element_ty))


def chunk_local(*, inputs: Inputs, chunks: Chunks, launches_for=launches_for) -> ChunkLocal:
    """Equations (1) to (4) of every chunk. ``launches_for``: a kernel set's, with fields as the general set's."""
    q, k, table = inputs.q, inputs.k, chunks.table
    _, heads, key_size = q.shape
    slots, num_segments = chunks.num_slots, chunks.num_segments
    decays = torch.empty(slots, heads, 2, CHUNK, dtype=torch.float32, device=q.device)
    key_scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=torch.float32, device=q.device)
    scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
    # The tile does not depend on V: K stands for V.
    launch = launches_for(q.device, q.dtype, key_size, key_size).chunk_scores
    _chunk_scores_kernel[(slots * heads,)](
        q=q,
        k=k,
        g=inputs.g,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        decays=decays,
        key_scores=key_scores,
        scores=scores,
        num_segments=num_segments,
        H=heads,
        K=key_size,
        BT=CHUNK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    solve = solve_chunks(key_scores, inputs.beta, chunks, q.dtype)
    return ChunkLocal(decays, solve, scores)
