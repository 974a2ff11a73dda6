"""Gated linear attention: dq, dk and dg of chunks that are not whole.

Shape legend: rows R, segments S, heads H, key size K, chunk length BT, block length BC, chunk slots N.

Names and sums of g as in `local_gradients`, whose equations (16) and (17) these kernels compute, too. The pairs j < i
are matrix products of blocks of BC = 16 rows, level by level. As the blocks of `blocks` do, a block of 32 rows, or of
64, has a later and an earlier half. With a_r of (20), and x = exp(a) q of late rows and exp(a) k of early rows, every
row has at every level the sum over the other half's rows s

    (22)  y_r = exp(a_r) * sum_s dP_rs x_s of a late row r,  exp(a_r) * sum_s dP_sr x_s of an early row r

which is the level's part of dq of a late row, and of dk of an early row. The gradient of a_r is q_r * y_r, or
k_r * y_r, and that of g follows from it, as from those of the exponents of u and w:

    (23)  dg_t = d_decays + sum over levels and rows r whose a_r has g_t of da_r
                 + sum_{i >= t} q_i exp(g(start, i]) u_i + sum_{j < t} k_j exp(g(j, end]) w_j

No two of these terms have to cancel, which after strong decay would leave rounding errors larger than dg. For the same
reason, the terms i = j of (16) and (17) are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import Inputs, StateParts
from mom_layers.recur.channel_decay.triton.blocks import (
    BLOCK,
    PRECISION,
    add_sums_of_columns,
    exponents,
    late_rows,
    meet,
    rows_after,
    rows_to_border,
    rows_until,
    sums_of_columns,
)
from mom_layers.recur.channel_decay.triton.launches import Launch
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import tile_of_chunk


@triton.jit
def _block(x, p_k, first, last, H: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    """The rows from ``first`` on of x, zero from ``last`` on. [BK, BC]. p_k: the chunk's first row, columns."""
    o_r = first + tl.arange(0, BC)
    return tl.load(x + p_k[:, None] + o_r[None, :] * (H * K), mask=(o_r < last)[None, :], other=0.0)


@triton.jit
def _decayed_block(
    q, k, g, u, w, p_k, first, last, H: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Of a block of rows: q exp(g[first, i]) and k exp(g(j, end of the block]) [BK, BC]; the exponential of the block's
    sum of g, and the sums of both times u and w [BK]."""
    b_g = exponents(_block(g, p_k, first, last, H, K, BC))
    b_until = sums_of_columns(rows_until(BC), b_g, EXACT)
    b_q = _block(q, p_k, first, last, H, K, BC) * tl.exp2(b_until)
    b_k = _block(k, p_k, first, last, H, K, BC) * tl.exp2(sums_of_columns(rows_after(BC), b_g, EXACT))
    b_u = _row_sums(b_q * _block(u, p_k, first, last, H, K, BC), BC, EXACT)
    b_w = _row_sums(b_k * _block(w, p_k, first, last, H, K, BC), BC, EXACT)
    return b_q, b_k, tl.exp2(_last_column(b_until, BC)), b_u, b_w


@triton.jit
def _last_column(b_x, BC: tl.constexpr):
    """[BK, BC] to [BK]."""
    return tl.sum(tl.where(tl.arange(0, BC)[None, :] == BC - 1, b_x, 0.0), 1)


@triton.jit
def _row_sums(b_x, BC: tl.constexpr, EXACT: tl.constexpr):
    """The sum over the block's rows [BK], by a product: its result is where a warp sums in few instructions."""
    b_all = tl.full([BC, BC], 1.0, tl.float32) > 0.0
    return _last_column(add_sums_of_columns(tl.zeros(b_x.shape, tl.float32), b_all, b_x, EXACT), BC)


@triton.jit
def _pairs(p_dP, i_b, other, late, BT: tl.constexpr, BC: tl.constexpr):
    """dP of the rows of block i_b, columns here, with those of the other block. [BC, BC]. late: block i_b is later."""
    o_r = tl.arange(0, BC)
    mine, others = tl.where(late, BT, 1), tl.where(late, 1, BT)
    return tl.load(p_dP + (i_b * BC + o_r)[None, :] * mine + (other * BC + o_r)[:, None] * others)


@triton.jit(do_not_specialize=["num_segments"])
def _block_gradients_kernel(
    q,
    k,
    g,
    u,
    w,
    d_decays,
    d_scores,
    whole_chunks,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    dq,
    dk,
    dg,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
):
    """BK channels of dq, dk and dg of one chunk and head that are not whole. Written for chunks of four blocks."""
    i_kb, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, K // BK)
    i_chunk = i_c.to(tl.int64) * H + i_h
    # Of a slot past the last chunk the flag is meaningless.
    if (i_s >= num_segments) | (tl.load(whole_chunks + i_chunk) != 0):
        return
    tl.static_assert(BT == 4 * BC)
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    p_dP = d_scores + i_chunk * BT * BT
    o_k = i_kb * BK + tl.arange(0, BK)
    p_k = (i_row.to(tl.int64) * H + i_h) * K + o_k
    o_r = tl.arange(0, BC)
    low = q.dtype.element_ty
    pair = d_scores.dtype.element_ty
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32

    # x of every block at the levels of 32 and 64 rows, each block's decay, and the sums over u and w.
    b_q0, b_k0, b_decay0, b_u0, b_w0 = _decayed_block(q, k, g, u, w, p_k, 0, last, H, K, BC, EXACT)
    b_q1, b_k1, b_decay1, b_u1, b_w1 = _decayed_block(q, k, g, u, w, p_k, BC, last, H, K, BC, EXACT)
    b_q2, b_k2, b_decay2, b_u2, b_w2 = _decayed_block(q, k, g, u, w, p_k, 2 * BC, last, H, K, BC, EXACT)
    b_q3, b_k3, b_decay3, b_u3, b_w3 = _decayed_block(q, k, g, u, w, p_k, 3 * BC, last, H, K, BC, EXACT)
    b_far0, b_far1 = (b_k0 * b_decay1[:, None]).to(pair), b_k1.to(pair)
    b_far2, b_far3 = b_q2.to(pair), (b_q3 * b_decay2[:, None]).to(pair)
    b_next0, b_next1, b_next2, b_next3 = b_k0.to(pair), b_q1.to(pair), b_k2.to(pair), b_q3.to(pair)
    # The decays from the chunk's start to a block, and from a block to the chunk's end; and the terms of (23) that all
    # rows of a block have: those of u in later blocks, of w in earlier ones.
    b_start2 = b_decay0 * b_decay1
    b_start3 = b_start2 * b_decay2
    b_end1 = b_decay2 * b_decay3
    b_end0 = b_decay1 * b_end1
    b_u3 = b_start3 * b_u3
    b_u2 = b_start2 * b_u2 + b_u3
    b_u1 = b_decay0 * b_u1 + b_u2
    b_d_decays = tl.load(d_decays + i_chunk * K + o_k)
    b_w0 = b_end0 * b_w0 + b_d_decays
    b_w1 = b_end1 * b_w1 + b_w0
    b_w2 = b_decay3 * b_w2 + b_w1

    # The blocks 3, 2, 0 and 1: at the level of 64 rows, all rows of block 3 decay over all of block 2, and all of
    # block 0 over all of block 1.
    b_far_da = tl.zeros([BK], tl.float32)
    for i in range(0, 4):
        i_b = tl.where(i < 2, 3 - i, i - 2)
        late, late_half = i_b % 2 == 1, i_b >= 2
        b_q = _block(q, p_k, i_b * BC, last, H, K, BC)
        b_k = _block(k, p_k, i_b * BC, last, H, K, BC)
        b_g = exponents(_block(g, p_k, i_b * BC, last, H, K, BC))
        b_others = _of_block(i_b, b_d_decays + b_u1, b_w0 + b_u2, b_w1 + b_u3, b_w2)
        b_dg = tl.zeros([BK, BC], tl.float32) + tl.where(i % 2 == 1, b_others + b_far_da, b_others)[:, None]

        # Equation (22) for the levels of 32 and of 64 rows, and what the states gave.
        b_until = tl.exp2(sums_of_columns(rows_until(BC), b_g, EXACT))
        b_after = tl.exp2(sums_of_columns(rows_after(BC), b_g, EXACT))
        b_next = _of_block(i_b, b_next1, b_next0, b_next3, b_next2)
        b_y = tl.dot(b_next, _pairs(p_dP, i_b, i_b ^ 1, late, BT, BC), input_precision=PRECISION)
        far = tl.where(late_half, 0, 2)
        b_x = tl.where(late_half, b_far0, b_far2)
        b_y_far = tl.dot(b_x, _pairs(p_dP, i_b, far, late_half, BT, BC), input_precision=PRECISION)
        b_x = tl.where(late_half, b_far1, b_far3)
        b_y_far = tl.dot(b_x, _pairs(p_dP, i_b, far + 1, late_half, BT, BC), b_y_far, input_precision=PRECISION)
        b_one = tl.full([BK], 1.0, tl.float32)
        b_y_far *= _of_block(i_b, b_decay1, b_one, b_one, b_decay2)[:, None]
        b_dq = _block(u, p_k, i_b * BC, last, H, K, BC) * _of_block(i_b, b_one, b_decay0, b_start2, b_start3)[:, None]
        b_dk = _block(w, p_k, i_b * BC, last, H, K, BC) * _of_block(i_b, b_end0, b_end1, b_decay3, b_one)[:, None]
        b_dq += tl.where(late, b_y, 0.0) + tl.where(late_half, b_y_far, 0.0)
        b_dk += tl.where(late, 0.0, b_y) + tl.where(late_half, 0.0, b_y_far)
        b_dq *= b_until
        b_dk *= b_after
        b_far_da = _row_sums(tl.where(late_half, b_q * b_until, b_k * b_after) * b_y_far, BC, EXACT)
        b_dg = add_sums_of_columns(b_dg, tl.trans(rows_until(BC)), b_q * b_dq, EXACT)
        b_dg = add_sums_of_columns(b_dg, tl.trans(rows_after(BC)), b_k * b_dk, EXACT)

        # Equation (22) for the levels inside the block.
        p_block = p_dP + i_b * BC * (BT + 1)
        o_rc = o_r[:, None] * BT + o_r[None, :]
        o_cr = o_r[None, :] * BT + o_r[:, None]
        b_dP = tl.load(p_block + tl.where(o_r[:, None] >= o_r[None, :], o_rc, o_cr))  # [BC, BC]
        for j in tl.static_range(4):
            b_late = late_rows(BC, 8 >> j)[None, :]
            b_which = rows_to_border(BC, 8 >> j)
            b_decay = tl.exp2(sums_of_columns(b_which, b_g, EXACT))
            b_x = tl.where(b_late, b_q * b_decay, b_k * b_decay)
            b_y = tl.dot(b_x.to(pair), tl.where(meet(BC, 8 >> j), b_dP, 0.0), input_precision=PRECISION)
            b_dg = add_sums_of_columns(b_dg, tl.trans(b_which), b_x * b_y, EXACT)
            b_y *= b_decay
            b_dq += tl.where(b_late, b_y, 0.0)
            b_dk += tl.where(b_late, 0.0, b_y)

        # The terms i = j of (16) and (17).
        b_diagonal = tl.load(p_block + o_r * (BT + 1)).to(tl.float32)[None, :]  # [1, BC]
        m_r = (i_b * BC + o_r < last)[None, :]
        p_kr = p_k[:, None] + (i_b * BC + o_r)[None, :] * (H * K)
        tl.store(dq + p_kr, (b_dq + b_diagonal * b_k).to(low), mask=m_r)
        tl.store(dk + p_kr, (b_dk + b_diagonal * b_q).to(low), mask=m_r)
        tl.store(dg + p_kr, b_dg.to(dg.dtype.element_ty), mask=m_r)


@triton.jit
def _of_block(i_b, b_0, b_1, b_2, b_3):
    """What belongs to block i_b of four."""
    return tl.where(i_b < 2, tl.where(i_b == 0, b_0, b_1), tl.where(i_b == 2, b_2, b_3))


def gradient_arguments(
    inputs: Inputs,
    chunks: Chunks,
    parts: StateParts,
    whole_chunks: torch.Tensor,
    d_scores: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    launch: Launch,
) -> dict:
    """The arguments that the kernels of rows' gradients share, of whole chunks and of the others.

    whole_chunks: [N, H] int32, from `chunk_local`. d_scores: dP [N, H, BT, BT]. gradients: dq, dk and dg, each
    [R, H, K], to be written.
    """
    dq, dk, dg = gradients
    return dict(
        q=inputs.q,
        k=inputs.k,
        g=inputs.g,
        u=parts.u,
        w=parts.w,
        d_decays=parts.d_decays,
        d_scores=d_scores,
        whole_chunks=whole_chunks,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        dq=dq,
        dk=dk,
        dg=dg,
        num_segments=chunks.num_segments,
        H=inputs.num_heads,
        K=inputs.k_dim,
        BT=CHUNK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def block_gradients(inputs: Inputs, chunks: Chunks, *tensors, launch: Launch) -> None:
    """Writes dq, dk and dg of the chunks and heads that are not whole. tensors: as for :func:`gradient_arguments`."""
    programs = chunks.num_slots * inputs.num_heads * (inputs.k_dim // launch.tile)
    _block_gradients_kernel[(programs,)](**gradient_arguments(inputs, chunks, *tensors, launch), BC=BLOCK)
