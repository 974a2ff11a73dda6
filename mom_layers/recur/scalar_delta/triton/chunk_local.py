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

from mom_layers.common.chips import chip_of
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.decays_triton import decay_between
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, Inputs
from mom_layers.recur.scalar_delta.triton.launches import SOLVE_WARPS, launches_for

# Rows of a diagonal block that is solved by substitution; products join the four blocks of a chunk.
BLOCK = 16
# Products of float32 inputs are exact in float32: no tf32. Other types ignore this setting. The triangular solve is
# float32 for every type; for 16-bit types its products take three tf32 parts, which lose no more than float32 does.
# AMD's compiler has no products of three tf32 parts, and exact ones.
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


@triton.jit
def _pick(b_blocks, i, BC: tl.constexpr):
    """Block i of [4, BC, BC]."""
    return tl.sum(tl.where(tl.arange(0, 4)[:, None, None] == i, b_blocks, 0.0), 0)


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_solve_kernel(
    beta,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    key_scores,
    solve,
    num_segments,
    H: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Equation (4) of one chunk and head, in float32: (I + A) X = N with A = N diag(beta).

    The four diagonal blocks are solved by substitution, the six blocks below by products.
    """
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    end = tl.load(cu_seqlens + i_s + 1)
    i_chunk = i_c.to(tl.int64) * H + i_h
    p_beta = beta + i_row.to(tl.int64) * H + i_h
    p_N = key_scores + i_chunk * BT * BT
    p_X = solve + i_chunk * BT * BT
    X_type = solve.dtype.element_ty

    o_b = tl.arange(0, 4)
    o_r = tl.arange(0, BC)
    o_t = o_b[:, None] * BC + o_r[None, :]
    p_diagonal = o_t[:, :, None] * BT + o_t[:, None, :]
    b_beta = tl.load(p_beta + o_t * H, mask=i_row + o_t < end, other=0.0).to(tl.float32)  # [4, BC]

    # Diagonal blocks of (4), column after column: once row i of X is final, A times this row leaves the rows below.
    b_X = tl.load(p_N + p_diagonal)  # [4, BC, BC]
    b_A = b_X * b_beta[:, None, :]
    for i in range(0, BC - 1):
        b_row = tl.sum(tl.where(o_r[None, :, None] == i, b_X, 0.0), 1)  # [4, BC]
        b_column = tl.sum(tl.where(o_r[None, None, :] == i, b_A, 0.0), 2)  # [4, BC]
        b_X = b_X - b_column[:, :, None] * b_row[:, None, :]
    tl.store(p_X + p_diagonal, b_X.to(X_type))

    # Blocks of (4) below the diagonal: X_ij = (I + A_ii)^-1 (N_ij - sum_{j <= m < i} A_im X_mj), where the inverse is
    # I - X_ii diag(beta).
    b_I = tl.where(o_r[None, :, None] == o_r[None, None, :], 1.0, 0.0) - b_X * b_beta[:, None, :]
    b_I1, b_I2, b_I3 = _pick(b_I, 1, BC), _pick(b_I, 2, BC), _pick(b_I, 3, BC)
    b_X00, b_X11, b_X22 = _pick(b_X, 0, BC), _pick(b_X, 1, BC), _pick(b_X, 2, BC)
    b_beta0 = tl.sum(tl.where(o_b[:, None] == 0, b_beta, 0.0), 0)[None, :]  # [1, BC]
    b_beta1 = tl.sum(tl.where(o_b[:, None] == 1, b_beta, 0.0), 0)[None, :]
    b_beta2 = tl.sum(tl.where(o_b[:, None] == 2, b_beta, 0.0), 0)[None, :]

    p_block = o_r[:, None] * BT + o_r[None, :]
    b_N10 = tl.load(p_N + 1 * BC * BT + 0 * BC + p_block)  # [BC, BC]
    b_N20 = tl.load(p_N + 2 * BC * BT + 0 * BC + p_block)  # [BC, BC]
    b_N21 = tl.load(p_N + 2 * BC * BT + 1 * BC + p_block)  # [BC, BC]
    b_N30 = tl.load(p_N + 3 * BC * BT + 0 * BC + p_block)  # [BC, BC]
    b_N31 = tl.load(p_N + 3 * BC * BT + 1 * BC + p_block)  # [BC, BC]
    b_N32 = tl.load(p_N + 3 * BC * BT + 2 * BC + p_block)  # [BC, BC]
    b_A20, b_A21 = b_N20 * b_beta0, b_N21 * b_beta1
    b_A30, b_A31, b_A32 = b_N30 * b_beta0, b_N31 * b_beta1, b_N32 * b_beta2

    # Each block needs those to its left and above it, so first the blocks just below the diagonal, then the others.
    b_X10 = tl.dot(b_I1, b_N10 - tl.dot(b_N10 * b_beta0, b_X00, input_precision=PRECISION), input_precision=PRECISION)
    b_right = b_N21 - tl.dot(b_A21, b_X11, input_precision=PRECISION)
    b_X21 = tl.dot(b_I2, b_right, input_precision=PRECISION)
    b_right = b_N32 - tl.dot(b_A32, b_X22, input_precision=PRECISION)
    b_X32 = tl.dot(b_I3, b_right, input_precision=PRECISION)
    b_right = b_N20 - tl.dot(b_A20, b_X00, input_precision=PRECISION)
    b_right -= tl.dot(b_A21, b_X10, input_precision=PRECISION)
    b_X20 = tl.dot(b_I2, b_right, input_precision=PRECISION)
    b_right = b_N31 - tl.dot(b_A31, b_X11, input_precision=PRECISION)
    b_right -= tl.dot(b_A32, b_X21, input_precision=PRECISION)
    b_X31 = tl.dot(b_I3, b_right, input_precision=PRECISION)
    b_right = b_N30 - tl.dot(b_A30, b_X00, input_precision=PRECISION)
    b_right -= tl.dot(b_A31, b_X10, input_precision=PRECISION)
    b_right -= tl.dot(b_A32, b_X20, input_precision=PRECISION)
    b_X30 = tl.dot(b_I3, b_right, input_precision=PRECISION)

    tl.store(p_X + 1 * BC * BT + 0 * BC + p_block, b_X10.to(X_type))
    tl.store(p_X + 2 * BC * BT + 0 * BC + p_block, b_X20.to(X_type))
    tl.store(p_X + 2 * BC * BT + 1 * BC + p_block, b_X21.to(X_type))
    tl.store(p_X + 3 * BC * BT + 0 * BC + p_block, b_X30.to(X_type))
    tl.store(p_X + 3 * BC * BT + 1 * BC + p_block, b_X31.to(X_type))
    tl.store(p_X + 3 * BC * BT + 2 * BC + p_block, b_X32.to(X_type))
    # The blocks above the diagonal are read as well, and must be zero.
    o_all = tl.arange(0, BT)
    above = o_all[:, None] // BC < o_all[None, :] // BC
    tl.store(p_X + o_all[:, None] * BT + o_all[None, :], tl.zeros([BT, BT], X_type), mask=above)


def chunk_local(*, inputs: Inputs, chunks: Chunks, launches_for=launches_for) -> ChunkLocal:
    """Equations (1) to (4) of every chunk. ``launches_for``: a kernel set's, with fields as the general set's."""
    q, k, table = inputs.q, inputs.k, chunks.table
    _, heads, key_size = q.shape
    slots, num_segments = chunks.num_slots, chunks.num_segments
    decays = torch.empty(slots, heads, 2, CHUNK, dtype=torch.float32, device=q.device)
    key_scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=torch.float32, device=q.device)
    scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
    solve = torch.empty_like(scores)
    # The tile does not depend on V: K stands for V.
    launch = launches_for(q.device, q.dtype, key_size, key_size).chunk_scores
    exact = q.dtype == torch.float32 or chip_of(q.device).vendor == "amd"
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
    _chunk_solve_kernel[(slots * heads,)](
        beta=inputs.beta,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        key_scores=key_scores,
        solve=solve,
        num_segments=num_segments,
        H=heads,
        BT=CHUNK,
        BC=BLOCK,
        PRECISION="ieee" if exact else "tf32x3",
        num_warps=SOLVE_WARPS,
    )
    return ChunkLocal(decays, solve, scores)
