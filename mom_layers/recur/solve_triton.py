"""The triangular solve inside a chunk, which every family with a delta rule takes: (I + N diag(beta)) X = N.

Storing X, and not the inverse I - X diag(beta), keeps the identity out of the inputs' type.

Shape legend: rows R, segments S, heads H, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.chips import chip_of
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import chunk_of_program

# Rows of a diagonal block that is solved by substitution; products join the four blocks of a chunk.
BLOCK = 16
# Warps of the solve: one spills a little, and was still the fastest on an H200.
SOLVE_WARPS = 1


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
    HAS_BETA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X of one chunk and head, in float32: (I + A) X = N with A = N diag(beta), or A = N without a beta.

    The four diagonal blocks are solved by substitution, the six blocks below by products.
    """
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_chunk = i_c.to(tl.int64) * H + i_h
    p_N = key_scores + i_chunk * BT * BT
    p_X = solve + i_chunk * BT * BT
    X_type = solve.dtype.element_ty

    o_b = tl.arange(0, 4)
    o_r = tl.arange(0, BC)
    o_t = o_b[:, None] * BC + o_r[None, :]
    p_diagonal = o_t[:, :, None] * BT + o_t[:, None, :]
    if HAS_BETA:
        i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
        m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
        p_beta = beta + i_row.to(tl.int64) * H + i_h
        b_beta = tl.load(p_beta + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [4, BC]
    else:
        b_beta = tl.full([4, BC], 1.0, tl.float32)

    # Diagonal blocks, column after column: once row i of X is final, A times this row leaves the rows below.
    b_X = tl.load(p_N + p_diagonal)  # [4, BC, BC]
    b_A = b_X * b_beta[:, None, :]
    for i in range(0, BC - 1):
        b_row = tl.sum(tl.where(o_r[None, :, None] == i, b_X, 0.0), 1)  # [4, BC]
        b_column = tl.sum(tl.where(o_r[None, None, :] == i, b_A, 0.0), 2)  # [4, BC]
        b_X = b_X - b_column[:, :, None] * b_row[:, None, :]
    tl.store(p_X + p_diagonal, b_X.to(X_type))

    # Blocks below the diagonal: X_ij = (I + A_ii)^-1 (N_ij - sum_{j <= m < i} A_im X_mj), where the inverse is
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


def solve_chunks(
    key_scores: torch.Tensor, beta: torch.Tensor | None, chunks: Chunks, dtype: torch.dtype
) -> torch.Tensor:
    """X = (I + N diag(beta))^-1 N of every chunk, in float32 inside: for 16-bit types the products take three tf32
    parts, which lose no more than float32 does. AMD's compiler has no products of three tf32 parts, and exact ones.

    Args:
        key_scores: N [slots, H, BT, BT] float32, strictly lower triangular.
        beta: [R, H]; 1 when absent.
        chunks: of the same rows.
        dtype: of the inputs, and of the result.

    Returns:
        [slots, H, BT, BT].
    """
    slots, heads, _, _ = key_scores.shape
    solve = torch.empty_like(key_scores, dtype=dtype)
    exact = dtype == torch.float32 or chip_of(key_scores.device).vendor == "amd"
    _chunk_solve_kernel[(slots * heads,)](
        beta=beta,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        key_scores=key_scores,
        solve=solve,
        num_segments=chunks.num_segments,
        H=heads,
        BT=CHUNK,
        BC=BLOCK,
        HAS_BETA=beta is not None,
        PRECISION="ieee" if exact else "tf32x3",
        num_warps=SOLVE_WARPS,
    )
    return solve
