"""The gradients of the gated delta rule inside a chunk; completes dq and dk.

Names as in the other files. From e, y and the parts of the gradients that come through the states,

    (16)  dv = beta * y
    (17)  dbeta = sum_V y * e
    (18)  dP = lower(scale * (do e^T) * beta_j * exp(G_i - G_j))
    (19)  dN = strictly_lower(-(y e^T) * beta_i * beta_j * exp(G_i - G_j))
    (20)  dq = dP k + from_state_q
    (21)  dk = dP^T q + dN k + dN^T k + from_state_k + to_state_k
    (22)  dg_t = the sum of the gradients of all exponents that g_t is part of

g_t is part of every exp(G_i - G_j) with j < t <= i, of exp(G_i) with t <= i, of exp(G_last - G_i) with i < t, and of
exp(G_last). The gradient of an exponent is that of its exponential times the exponential: q * dq or k * dk summed over
K, term by term. Terms without decay (i = j) are left out and not cancelled: under strong decay their rounding errors
would be larger than dg.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.decays_triton import decay_between, decay_through_chunk
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.scalar_delta.tensors import ErrorRows, Inputs, StateGradients
from mom_layers.recur.scalar_delta.triton.chunk_local import PRECISION
from mom_layers.recur.scalar_delta.triton.launches import launches_for


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
    d_key_scores,
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
    """(17), (18), (19) and P's part of (22), of one chunk and head.

    dP and dN go through memory on purpose: their transposes are left operands of the next kernel's products.
    """
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h

    b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    b_g = tl.load(g + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    # (17), and the products of (18) and (19), BV columns at a time.
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

    # (18) and (19): the factors beside the products. P's exponents give their part of (22), which leaves i = j out.
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
    tl.store(d_key_scores + i_chunk * BT * BT + o_tt, b_dN.to(d_key_scores.dtype.element_ty))
    tl.store(d_decay + i_chunk * BT + o_t, b_d_decay)
    tl.store(dbeta + rows + o_t * H, b_dbeta.to(dbeta.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["num_segments", "num_slots"])
def _query_key_gradients_kernel(
    q,
    k,
    beta,
    d_errors,
    d_key_scores,
    d_scores,
    d_decay,
    row_terms,
    totals,
    boundary,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    chunk_offsets,
    span_offsets,
    dq,
    dk,
    dg,
    num_segments,
    num_slots,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    PARTS: tl.constexpr,
    BOUNDARY_PARTS: tl.constexpr,
    FROM_ZERO: tl.constexpr,
):
    """(20), (21), (22) and (16) of one chunk and head. dq and dk hold the parts from the states already."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_index = tl.load(chunk_index + i_c)
    i_row = tl.load(cu_seqlens + i_s) + i_index * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h
    o_tt = o_t[:, None] * BT + o_t[None, :]

    # (22), the exponents of P and of the states: b_dG of exp(G) and the like, b_d_to_end of exp(G_last - G).
    b_dG = tl.load(d_decay + i_chunk * BT + o_t)  # [BT]
    b_d_to_end = tl.zeros([BT], tl.float32)
    p_from_state = row_terms + i_chunk * PARTS * BT
    p_to_state = p_from_state + num_slots.to(tl.int64) * H * PARTS * BT
    for i_part in tl.static_range(PARTS):
        b_dG += tl.load(p_from_state + i_part * BT + o_t)
        b_d_to_end += tl.load(p_to_state + i_part * BT + o_t)
    # (20) and (21), BK columns at a time; N's part of (22) on the way.
    b_dP = tl.load(d_scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
    b_dN = tl.load(d_key_scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
    for i_k in range(0, K, BK):
        o_tk = o_t[:, None] * (H * K) + i_k + tl.arange(0, BK)[None, :]
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_dq = tl.load(dq + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_dq += tl.dot(b_dP, b_k, input_precision=PRECISION)
        tl.store(dq + rows * K + o_tk, b_dq.to(dq.dtype.element_ty), mask=m_t[:, None])

        b_from_earlier = tl.dot(b_dN, b_k, input_precision=PRECISION)
        b_from_later = tl.dot(tl.trans(b_dN), b_k, input_precision=PRECISION)
        b_dG += tl.sum(b_k.to(tl.float32) * (b_from_earlier - b_from_later), 1)
        b_dk = tl.load(dk + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BK]
        b_dk += b_from_earlier + b_from_later
        b_dk += tl.dot(tl.trans(b_dP), b_q, input_precision=PRECISION)
        tl.store(dk + rows * K + o_tk, b_dk.to(dk.dtype.element_ty), mask=m_t[:, None])

    # (22): from the exponents to g, whose row t is part of G from t on, and of G_last - G before t.
    d_chunk_decay = decay_through_chunk(
        totals, boundary, chunk_offsets, span_offsets, i_c, i_s, i_h, i_index, num_slots,
        H, SPAN, PARTS, BOUNDARY_PARTS, FROM_ZERO,
    )  # fmt: skip
    b_dg = tl.sum(tl.where(o_t[:, None] >= o_t[None, :], b_dG[:, None], b_d_to_end[:, None]), 0)
    b_dg += d_chunk_decay
    tl.store(dg + rows + o_t * H, b_dg.to(dg.dtype.element_ty), mask=m_t)

    # (16): dv takes y's place, for no other program reads these rows and this head.
    b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
    for i_v in range(0, V, BV):
        o_tv = o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_dv = (b_beta * b_y.to(tl.float32)).to(d_errors.dtype.element_ty)
        tl.store(d_errors + rows * V + o_tv, b_dv, mask=m_t[:, None])


def local_gradients(
    *,
    inputs: Inputs,
    rows: ErrorRows,
    scores: torch.Tensor,
    chunks: Chunks,
    so_far: StateGradients,
    boundary: torch.Tensor,
    from_zero: bool,
    launches_for=launches_for,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Equations (16) to (22) of every chunk: completes dq and dk of ``so_far``, and writes dv over ``rows.d_errors``.

    Args:
        inputs, rows, scores, chunks: of the same rows.
        so_far: what `state_gradients` returned for both directions.
        boundary: [M, H, parts] float32, <S, dS> after every span, from `reverse_recurrence`.
        from_zero: there was no initial state.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        dg and dbeta [R, H], in the types of g and beta.
    """
    k, table = inputs.k, chunks.table
    (_, heads, key_size), value_size = k.shape, rows.do.shape[2]
    slots, num_segments = chunks.num_slots, chunks.num_segments
    launches = launches_for(k.device, k.dtype, key_size, value_size)
    dg, dbeta = torch.empty_like(inputs.g), torch.empty_like(inputs.beta)
    d_scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=k.dtype, device=k.device)
    d_key_scores = torch.empty_like(d_scores)
    d_decay = torch.empty(slots, heads, CHUNK, dtype=torch.float32, device=k.device)
    launch = launches.score_gradients
    _score_gradients_kernel[(slots * heads,)](
        g=inputs.g,
        beta=inputs.beta,
        scores=scores,
        errors=rows.errors,
        d_errors=rows.d_errors,
        do=rows.do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        d_key_scores=d_key_scores,
        d_scores=d_scores,
        d_decay=d_decay,
        dbeta=dbeta,
        scale=inputs.scale,
        num_segments=num_segments,
        H=heads,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    launch = launches.query_key_gradients
    _query_key_gradients_kernel[(slots * heads,)](
        q=inputs.q,
        k=k,
        beta=inputs.beta,
        d_errors=rows.d_errors,
        d_key_scores=d_key_scores,
        d_scores=d_scores,
        d_decay=d_decay,
        row_terms=so_far.row_terms,
        totals=so_far.totals,
        boundary=boundary,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        chunk_offsets=table.offsets,
        span_offsets=chunks.spans.offsets,
        dq=so_far.dq,
        dk=so_far.dk,
        dg=dg,
        num_segments=num_segments,
        num_slots=slots,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=min(launch.tile, key_size),
        BV=min(launch.tile, value_size),
        SPAN=SPAN,
        PARTS=so_far.parts,
        BOUNDARY_PARTS=boundary.shape[2],
        FROM_ZERO=from_zero,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dg, dbeta
