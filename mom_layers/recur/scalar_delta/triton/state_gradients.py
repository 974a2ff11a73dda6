"""The gradients of the gated delta rule that come through the states: parts of dq and dk, and what dg takes of them.

Names as in `recurrence` and `reverse_recurrence`. Once e and y are known, S and dS follow from chunk to chunk by (8)
and (11) without a solve, as sums, for any rows of the state and from any chunk on. So S and dS are stored once a span;
the kernel here computes the states of the chunks between again, and from these states

    (12)  from_state_q = scale * exp(G) * (do S^T)            part of dq
    (13)  from_state_k = -exp(G) * beta * (y S^T)             part of dk
    (14)  to_state_k   = exp(G_last - G) * beta * (e dS^T)    part of dk
    (15)  sum_K (q * from_state_q + k * from_state_k)  and  sum_K k * to_state_k,  a row's and a chunk's

The sums (15) serve dg. The decay of a whole chunk adds exp(G_last) <S, dS> to dg, with the S before and the dS after
the chunk. No kernel has both S and dS, but <S, dS> at the chunk's start is that product plus the chunk's first sum, and
<S, dS> at the chunk's end is that product plus the chunk's second sum. So the product follows, chunk by chunk, from the
<S, dS> that the reverse recurrence stores where a span ends. After a segment's last chunk, where S may hold rows that
have not decayed, only the decayed part of S is taken: the rest would have to cancel.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.sums_triton import sum_of_vector
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.program_place_triton import rows_of_span, span_of_program
from mom_layers.recur.scalar_delta.tensors import ErrorRows, Inputs, StateGradients
from mom_layers.recur.scalar_delta.triton.chunk_local import PRECISION
from mom_layers.recur.scalar_delta.triton.launches import launches_for


@triton.jit(do_not_specialize=["num_segments"])
def _state_gradients_kernel(
    q,
    k,
    beta,
    decays,
    errors,
    d_errors,
    do,
    states,
    cu_seqlens,
    chunk_offsets,
    span_segment,
    span_index,
    dq,
    dk,
    row_terms,
    totals,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPAN: tl.constexpr,
    REVERSE: tl.constexpr,
    LATE: tl.constexpr,
):
    """BK rows of S along one span and head for (12) and (13), or of dS against time for (14), where REVERSE.

    REVERSE runs first and writes dk; the other direction writes dq and adds to dk. Both store (15), in parts of K.
    """
    i_kb, i_h, i_span, i_s = span_of_program(span_segment, H, K // BK)
    if i_s >= num_segments:
        return
    i_first, num_rows, num_chunks, i_slot = rows_of_span(cu_seqlens, chunk_offsets, span_index, i_span, i_s, BT, SPAN)

    # Offsets of a chunk's tiles, and BK rows of the stored state, from which the others follow.
    o_t = tl.arange(0, BT)
    o_k = i_kb * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    low = k.dtype.element_ty
    p_states = states + (i_span.to(tl.int64) * H + i_h) * K * V
    b_S = tl.load(p_states + o_k[:, None] * V + o_v[None, :]).to(tl.float32)  # [BK, V]
    for i in range(0, num_chunks):
        # The chunk's rows: BK columns of q and k, all columns of e, y and do.
        i_t = num_chunks - 1 - i if REVERSE else i
        m_t = i_t * BT + o_t < num_rows
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_slot + i_t).to(tl.int64) * H + i_h
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        if REVERSE or not LATE:
            b_e = tl.load(errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        if not LATE:
            b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        if not (REVERSE and LATE):
            b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(decays + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(decays + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(decays + i_chunk * 2 * BT + BT - 1)
        # S before the chunk, or dS after it, as the products read it; then decayed, for (8) or (11).
        b_S_low = b_S.to(low)
        b_S = chunk_decay * b_S
        if REVERSE:
            # (14) and its (15), then dS before the chunk by (11).
            b_dk = (b_to_end * b_beta) * tl.dot(b_e, tl.trans(b_S_low), input_precision=PRECISION)
            b_term = tl.sum(b_k.to(tl.float32) * b_dk, 1)
            if LATE:
                tl.store(dk + rows * K + o_tk, b_dk.to(low), mask=m_t[:, None])
                b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
            b_q_side = ((scale * b_from_start) * b_do.to(tl.float32)).to(low)
            b_S += tl.dot(tl.trans(b_q), b_q_side, input_precision=PRECISION)
            if LATE:
                b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
            b_k_side = ((-b_from_start * b_beta) * b_y.to(tl.float32)).to(low)
            b_S += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
        else:
            # (12), (13) and their (15), then S after the chunk by (8).
            b_dq = (scale * b_from_start) * tl.dot(b_do, tl.trans(b_S_low), input_precision=PRECISION)
            if LATE:
                tl.store(dq + rows * K + o_tk, b_dq.to(low), mask=m_t[:, None])
                b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
            b_dk = (-b_from_start * b_beta) * tl.dot(b_y, tl.trans(b_S_low), input_precision=PRECISION)
            b_term = tl.sum(b_q.to(tl.float32) * b_dq + b_k.to(tl.float32) * b_dk, 1)
            if LATE:
                b_e = tl.load(errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
            b_k_side = ((b_to_end * b_beta) * b_e.to(tl.float32)).to(low)
            b_S += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
            if not LATE:
                tl.store(dq + rows * K + o_tk, b_dq.to(low), mask=m_t[:, None])
            b_dk += tl.load(dk + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)
        if not (REVERSE and LATE):
            tl.store(dk + rows * K + o_tk, b_dk.to(low), mask=m_t[:, None])
        # (15): row by row, and the chunk's sum.
        i_part = i_chunk * (K // BK) + i_kb
        tl.store(row_terms + i_part * BT + o_t, b_term)
        tl.store(totals + i_part + tl.arange(0, 1), sum_of_vector(b_term))


def state_gradients(
    *,
    inputs: Inputs,
    rows: ErrorRows,
    decays: torch.Tensor,
    chunks: Chunks,
    states: torch.Tensor,
    so_far: StateGradients | None,
    launches_for=launches_for,
) -> StateGradients:
    """Equations (12) to (15) along every span; called twice.

    Args:
        inputs, rows, decays, chunks: of the same rows.
        states: [M, H, K, V]. In the first call dS after every span, in the second S before every span.
        so_far: None in the first call, which computes (14); the first call's result in the second, which computes (12)
            and (13).
        launches_for: a kernel set's, with fields as the general set's.
    """
    q, k = inputs.q, inputs.k
    (_, heads, key_size), value_size = k.shape, rows.do.shape[2]
    launch = launches_for(k.device, k.dtype, key_size, value_size).state_gradients
    parts, reverse = key_size // launch.tile, so_far is None
    gradients = StateGradients.empty(k, chunks.num_slots, CHUNK, parts) if reverse else so_far.with_dq(q)
    _state_gradients_kernel[(chunks.num_span_slots * heads * parts,)](
        q=q,
        k=k,
        beta=inputs.beta,
        decays=decays,
        errors=rows.errors,
        d_errors=rows.d_errors,
        do=rows.do,
        states=states,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_segment=chunks.spans.segment,
        span_index=chunks.spans.index,
        dq=gradients.dq,
        dk=gradients.dk,
        row_terms=gradients.row_terms[int(reverse)],
        totals=gradients.totals[int(reverse)],
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=launch.tile,
        SPAN=SPAN,
        REVERSE=reverse,
        LATE=launch.late,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return gradients
