"""Gated linear attention: dq, dk and dg, from a chunk's own rows and from what the states gave.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, block length BC, chunk slots N.

Sums of g are written as in `chunk_local`; u, w and d_decays are those of `state_gradients`:

    (15)  dP = scale * lower(do v^T)
    (16)  dq_i = sum_{j <= i} dP_ij k_j exp(g(j, i]) + exp(g(start, i]) u_i
    (17)  dk_j = sum_{i >= j} dP_ij q_i exp(g(j, i]) + exp(g(j, end]) w_j

The pairs j < i are matrix products of blocks of BC = 16 rows, level by level. As the blocks of `blocks` do, a block of
32 rows, or of 64, has a later and an earlier half. With a_r of (21), and x = exp(a) q of late rows and exp(a) k of early
rows, every row has at every level the sum over the other half's rows s

    (18)  y_r = exp(a_r) * sum_s dP_rs x_s of a late row r,  exp(a_r) * sum_s dP_sr x_s of an early row r

which is the level's part of dq of a late row, and of dk of an early row. The gradient of a_r is q_r * y_r, or k_r * y_r,
and that of g follows from it, as from those of the exponents of u and w:

    (19)  dg_t = d_decays + sum over levels and rows r whose a_r has g_t of da_r
                 + sum_{i >= t} q_i exp(g(start, i]) u_i + sum_{j < t} k_j exp(g(j, end]) w_j

No two of these terms have to cancel, which after strong decay would leave rounding errors larger than dg. For the same
reason, the terms i = j of (16) and (17) are left out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.channel_decay.tensors import Inputs, StateParts
from mom_layers.recur.channel_decay.triton.blocks import (
    BLOCK,
    PRECISION,
    at_least,
    late_rows,
    meet,
    rows_after,
    rows_to_border,
    rows_until,
    sums_of_rows,
)
from mom_layers.recur.channel_decay.triton.launches import Launch, launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import chunk_of_program, tile_of_chunk


@triton.jit(do_not_specialize=["num_segments"])
def _score_gradients_kernel(
    v,
    do,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    d_scores,
    scale,
    num_segments,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """dP (15) of one chunk and head."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = (i_row + o_t < tl.load(cu_seqlens + i_s + 1))[:, None]
    b_dP = tl.zeros([BT, BT], tl.float32)
    for i_v in range(0, V, BV):
        o_tv = o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_dP += tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_dP = tl.where(o_t[:, None] >= o_t[None, :], scale * b_dP, 0.0)
    p_dP = d_scores + (i_c.to(tl.int64) * H + i_h) * BT * BT + o_t[:, None] * BT + o_t[None, :]
    tl.store(p_dP, b_dP.to(d_scores.dtype.element_ty))


@triton.jit
def _block(x, p_k, first, last, H: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    """The rows from ``first`` on of x, zero from ``last`` on. float32 [BC, BK]. p_k: the chunk's first row, columns."""
    o_r = first + tl.arange(0, BC)
    return tl.load(x + p_k[None, :] + o_r[:, None] * (H * K), mask=(o_r < last)[:, None], other=0.0).to(tl.float32)


@triton.jit
def _decayed_block(
    q, k, g, u, w, p_k, first, last, H: tl.constexpr, K: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Of a block of rows: q exp(g[first, i]) and k exp(g(j, end of the block]) [BC, BK]; the exponential of the block's
    sum of g, and the sums of both times u and w [BK]."""
    b_g = at_least(_block(g, p_k, first, last, H, K, BC))
    b_q = _block(q, p_k, first, last, H, K, BC) * exp(sums_of_rows(rows_until(BC), b_g, EXACT))
    b_k = _block(k, p_k, first, last, H, K, BC) * exp(sums_of_rows(rows_after(BC), b_g, EXACT))
    b_u = tl.sum(b_q * _block(u, p_k, first, last, H, K, BC), 0)
    return b_q, b_k, exp(tl.sum(b_g, 0)), b_u, tl.sum(b_k * _block(w, p_k, first, last, H, K, BC), 0)


@triton.jit
def _pairs(p_dP, B: tl.constexpr, OTHER: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """dP of the rows of block B with those of an earlier block, or dP of those of a later block with them. [BC, BC]."""
    o_r = tl.arange(0, BC)
    if B > OTHER:
        return tl.load(p_dP + (B * BC + o_r)[:, None] * BT + (OTHER * BC + o_r)[None, :])
    else:
        return tl.load(p_dP + (OTHER * BC + o_r)[None, :] * BT + (B * BC + o_r)[:, None])


@triton.jit
def _gradients_of_block(
    q, k, g, u, w, p_dP, dq, dk, dg, p_k, last,
    b_next, b_far, b_farther, b_to_border, b_from_start, b_to_end, b_others,
    B: tl.constexpr, H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Stores dq, dk and dg of block B of a chunk, and returns the sum over its rows of da of the level of 64 rows [BK].

    b_next: x of the block that block B meets at the level of 32 rows. b_far, b_farther: x of the two blocks at the level
    of 64 rows, in the order of rows. b_to_border: decay between the block and that level's border. b_from_start,
    b_to_end: decay from the chunk's start to the block, and from the block to the chunk's end. b_others: the terms of
    (19) that are the same for all rows of the block.
    """
    low = q.dtype.element_ty
    o_r = tl.arange(0, BC)
    b_q = _block(q, p_k, B * BC, last, H, K, BC)
    b_k = _block(k, p_k, B * BC, last, H, K, BC)
    b_g = at_least(_block(g, p_k, B * BC, last, H, K, BC))
    b_until = exp(sums_of_rows(rows_until(BC), b_g, EXACT))
    b_after = exp(sums_of_rows(rows_after(BC), b_g, EXACT))

    # Equation (18) for the levels of 32 and of 64 rows.
    b_y = tl.dot(_pairs(p_dP, B, B ^ 1, BT, BC), b_next, input_precision=PRECISION)
    FAR: tl.constexpr = 2 - B // 2 * 2
    b_y_far = tl.dot(_pairs(p_dP, B, FAR, BT, BC), b_far, input_precision=PRECISION)
    b_y_far = tl.dot(_pairs(p_dP, B, FAR + 1, BT, BC), b_farther, b_y_far, input_precision=PRECISION)
    b_y_far *= b_to_border[None, :]
    b_dq = b_from_start[None, :] * _block(u, p_k, B * BC, last, H, K, BC)
    b_dk = b_to_end[None, :] * _block(w, p_k, B * BC, last, H, K, BC)
    if B % 2 == 1:
        b_dq += b_y
    else:
        b_dk += b_y
    if B >= 2:
        b_dq += b_y_far
        b_far_a = tl.sum(b_q * b_until * b_y_far, 0)
    else:
        b_dk += b_y_far
        b_far_a = tl.sum(b_k * b_after * b_y_far, 0)
    b_dq *= b_until
    b_dk *= b_after
    b_dg = b_others[None, :] + sums_of_rows(o_r[None, :] >= o_r[:, None], b_q * b_dq, EXACT, 2)
    b_dg += sums_of_rows(o_r[None, :] < o_r[:, None], b_k * b_dk, EXACT, 2)

    # Equation (18) for the levels inside the block.
    p_block = p_dP + B * BC * (BT + 1)
    o_rc = o_r[:, None] * BT + o_r[None, :]
    o_cr = o_r[None, :] * BT + o_r[:, None]
    b_dP = tl.load(p_block + tl.where(o_r[:, None] >= o_r[None, :], o_rc, o_cr))  # [BC, BC]
    for i in tl.static_range(4):
        b_late = late_rows(BC, 8 >> i)[:, None]
        b_which = rows_to_border(BC, 8 >> i)
        b_mine = tl.where(b_late, b_q, b_k)
        b_decay = exp(sums_of_rows(b_which, b_g, EXACT))
        b_x = (b_mine * b_decay).to(low)
        b_y = b_decay * tl.dot(tl.where(meet(BC, 8 >> i), b_dP, 0.0), b_x, input_precision=PRECISION)
        b_dq += tl.where(b_late, b_y, 0.0)
        b_dk += tl.where(b_late, 0.0, b_y)
        b_dg += sums_of_rows(tl.trans(b_which), b_mine * b_y, EXACT, 2)

    # The terms i = j of (16) and (17).
    b_diagonal = tl.load(p_block + o_r * (BT + 1)).to(tl.float32)[:, None]  # [BC, 1]
    m_r = (B * BC + o_r < last)[:, None]
    p_rk = p_k[None, :] + (B * BC + o_r)[:, None] * (H * K)
    tl.store(dq + p_rk, (b_dq + b_diagonal * b_k).to(low), mask=m_r)
    tl.store(dk + p_rk, (b_dk + b_diagonal * b_q).to(low), mask=m_r)
    tl.store(dg + p_rk, b_dg.to(dg.dtype.element_ty), mask=m_r)
    return b_far_a


@triton.jit(do_not_specialize=["num_segments"])
def _query_key_gradients_kernel(
    q,
    k,
    g,
    u,
    w,
    d_decays,
    d_scores,
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
    """BK channels of dq, dk and dg of one chunk and head. Written for chunks of four blocks."""
    i_kb, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, K // BK)
    if i_s >= num_segments:
        return
    tl.static_assert(BT == 4 * BC)
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1) - i_row
    i_chunk = i_c.to(tl.int64) * H + i_h
    p_dP = d_scores + i_chunk * BT * BT
    o_k = i_kb * BK + tl.arange(0, BK)
    p_k = (i_row.to(tl.int64) * H + i_h) * K + o_k
    low = q.dtype.element_ty
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32

    # x of every block at the levels of 32 and 64 rows, each block's decay, and the sums over u and w.
    b_q0, b_k0, b_decay0, b_u0, b_w0 = _decayed_block(q, k, g, u, w, p_k, 0, last, H, K, BC, EXACT)
    b_q1, b_k1, b_decay1, b_u1, b_w1 = _decayed_block(q, k, g, u, w, p_k, BC, last, H, K, BC, EXACT)
    b_q2, b_k2, b_decay2, b_u2, b_w2 = _decayed_block(q, k, g, u, w, p_k, 2 * BC, last, H, K, BC, EXACT)
    b_q3, b_k3, b_decay3, b_u3, b_w3 = _decayed_block(q, k, g, u, w, p_k, 3 * BC, last, H, K, BC, EXACT)
    b_far0, b_far1 = (b_k0 * b_decay1[None, :]).to(low), b_k1.to(low)
    b_far2, b_far3 = b_q2.to(low), (b_q3 * b_decay2[None, :]).to(low)
    b_next0, b_next1, b_next2, b_next3 = b_k0.to(low), b_q1.to(low), b_k2.to(low), b_q3.to(low)
    # The decays from a block to the chunk's end, and from the chunk's start to a block.
    b_one = tl.full([BK], 1.0, tl.float32)
    b_end1 = b_decay2 * b_decay3
    b_end0 = b_decay1 * b_end1
    b_start2 = b_decay0 * b_decay1
    b_start3 = b_start2 * b_decay2
    # The terms of (19) that all rows of a block have: those of the blocks before and after.
    b_u3 *= b_start3
    b_u2 = b_start2 * b_u2 + b_u3
    b_u1 = b_decay0 * b_u1 + b_u2
    b_w0 = b_end0 * b_w0 + tl.load(d_decays + i_chunk * K + o_k)
    b_w1 = b_end1 * b_w1 + b_w0
    b_w2 = b_decay3 * b_w2 + b_w1

    b_far_a = _gradients_of_block(
        q, k, g, u, w, p_dP, dq, dk, dg, p_k, last,
        b_next2, b_far0, b_far1, b_decay2, b_start3, b_one, b_w2, 3, H, K, BT, BC, EXACT,
    )  # fmt: skip
    _gradients_of_block(
        q, k, g, u, w, p_dP, dq, dk, dg, p_k, last,
        b_next3, b_far0, b_far1, b_one, b_start2, b_decay3, b_w1 + b_u3 + b_far_a, 2, H, K, BT, BC, EXACT,
    )  # fmt: skip
    b_far_a = _gradients_of_block(
        q, k, g, u, w, p_dP, dq, dk, dg, p_k, last,
        b_next1, b_far2, b_far3, b_decay1, b_one, b_end0, tl.load(d_decays + i_chunk * K + o_k) + b_u1,
        0, H, K, BT, BC, EXACT,
    )  # fmt: skip
    _gradients_of_block(
        q, k, g, u, w, p_dP, dq, dk, dg, p_k, last,
        b_next0, b_far2, b_far3, b_one, b_decay0, b_end1, b_w0 + b_u2 + b_far_a, 1, H, K, BT, BC, EXACT,
    )  # fmt: skip


def local_gradients(
    *, inputs: Inputs, do: torch.Tensor, chunks: Chunks, parts: StateParts, launches_for=launches_for
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations (15) to (19) of every chunk.

    Args:
        inputs, chunks: of the same rows.
        do: [R, H, V], the gradient of o, contiguous.
        parts: from ``state_gradients``.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        dq, dk, dg [R, H, K], in the types of q, k and g.
    """
    q, heads, k_dim = inputs.q, inputs.num_heads, inputs.k_dim
    launches = launches_for(q.device, q.dtype, k_dim, inputs.v_dim)
    d_scores = _score_gradients(inputs, do, chunks, launches.score_gradients)
    dq, dk, dg = torch.empty_like(q), torch.empty_like(inputs.k), torch.empty_like(inputs.g)
    launch = launches.query_key_gradients
    _query_key_gradients_kernel[(chunks.num_slots * heads * (k_dim // launch.tile),)](
        q=q,
        k=inputs.k,
        g=inputs.g,
        u=parts.u,
        w=parts.w,
        d_decays=parts.d_decays,
        d_scores=d_scores,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        dq=dq,
        dk=dk,
        dg=dg,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        BT=CHUNK,
        BC=BLOCK,
        BK=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dq, dk, dg


def _score_gradients(inputs: Inputs, do: torch.Tensor, chunks: Chunks, launch: Launch) -> torch.Tensor:
    """dP of every chunk [N, H, BT, BT] in q's type."""
    v, heads, v_dim = inputs.v, inputs.num_heads, inputs.v_dim
    d_scores = torch.empty(chunks.num_slots, heads, CHUNK, CHUNK, dtype=v.dtype, device=v.device)
    _score_gradients_kernel[(chunks.num_slots * heads,)](
        v=v,
        do=do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        d_scores=d_scores,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return d_scores
