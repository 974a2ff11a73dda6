"""The recurrence of the gated delta rule, from chunk to chunk along every segment.

With G the sum of g from the chunk's first row on, P and X as `chunk_local` computes them, and S the state at the
chunk's start, a chunk of the recurrence is

    (5)  r = v - exp(G) * (k S)                               the error of the decayed state's prediction
    (6)  e = r - X (beta * r)                                 the error of the prediction by the state before each row
    (7)  o = scale * (exp(G) * (q S) + P (beta * e))
    (8)  S <- exp(G_last) S + k^T (exp(G_last - G) * beta * e)

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.program_place_triton import segment_of_program
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, Inputs, RecurrenceResults
from mom_layers.recur.scalar_delta.triton.chunk_local import PRECISION
from mom_layers.recur.scalar_delta.triton.launches import launches_for


@triton.jit
def _recurrence_kernel(
    q,
    k,
    v,
    beta,
    decays,
    solve,
    scores,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    initial_state,
    o,
    final_state,
    decayed_state,
    span_states,
    errors,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
    LATE: tl.constexpr,
):
    """Equations (5) to (8) for BV columns of the state along one segment and head.

    For the backward pass it also stores e, the state before every span, and the decayed part of the final state.
    """
    i_v, i_h, i_s, i_first, num_rows = segment_of_program(cu_seqlens, H, V // BV)
    i_chunk = tl.load(chunk_offsets + i_s).to(tl.int64) * H + i_h
    rows = i_first.to(tl.int64) * H + i_h

    # Offsets of a chunk's tiles, and of the state's columns.
    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = k.dtype.element_ty

    # S stays in registers, in float32; products read it rounded to the inputs' type.
    if HAS_INITIAL_STATE:
        b_S = tl.load(initial_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_S = tl.zeros([K, BV], tl.float32)
    for i_t in range(0, tl.cdiv(num_rows, BT)):
        # The chunk's rows and what chunk_local computed of them. q and P come later, when they are needed.
        m_t = i_t * BT + o_t < num_rows
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BV]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(decays + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(decays + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(decays + i_chunk * 2 * BT + BT - 1)
        b_X = tl.load(solve + i_chunk * BT * BT + o_tt)  # [BT, BT]

        # (5) and (6): the part of v that the state does not predict. The backward pass reads e, and a state a span.
        b_S_low = b_S.to(low)
        b_r = b_v - b_from_start * tl.dot(b_k, b_S_low, input_precision=PRECISION)
        b_e = b_r - tl.dot(b_X, (b_beta * b_r).to(low), input_precision=PRECISION)
        b_u = b_beta * b_e
        if FOR_BACKWARD:
            tl.store(errors + rows * V + o_tv, b_e.to(low), mask=m_t[:, None])
            if i_t % SPAN == 0:
                i_span = (tl.load(span_offsets + i_s) + i_t // SPAN).to(tl.int64) * H + i_h
                tl.store(span_states + i_span * K * V + o_kv, b_S_low)
        # (7): what the rows read, from the state and from earlier rows of the chunk.
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_o = b_from_start * tl.dot(b_q, b_S_low, input_precision=PRECISION)
        b_o += tl.dot(b_P, b_u.to(low), input_precision=PRECISION)
        tl.store(o + rows * V + o_tv, (scale * b_o).to(low), mask=m_t[:, None])
        # (8): the state after the chunk.
        b_S = chunk_decay * b_S
        if FOR_BACKWARD and STORE_FINAL_STATE:
            # What is left of S after the last chunk's decay, before that chunk's own rows are added.
            if (i_t + 1) * BT >= num_rows:
                tl.store(decayed_state + i_state + o_kv, b_S.to(low))
        if LATE:
            b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K], which q has displaced
        b_S += tl.dot(tl.trans(b_k), (b_to_end * b_u).to(low), input_precision=PRECISION)
        rows += BT * H
        i_chunk += H
    if STORE_FINAL_STATE:
        tl.store(final_state + i_state + o_kv, b_S)


def recurrence(
    *,
    inputs: Inputs,
    v: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    for_backward: bool,
    launches_for=launches_for,
) -> RecurrenceResults:
    """Equations (5) to (8) along every segment.

    Args:
        inputs, local, chunks: of the same rows.
        v: [R, H, V], contiguous.
        initial_state: [S, H, K, V] float32, contiguous; zeros when absent.
        output_final_state: also fill the final state.
        for_backward: also fill what the backward pass reads.
        launches_for: a kernel set's, with fields as the general set's.
    """
    k, (_, heads, value_size) = inputs.k, v.shape
    key_size = k.shape[2]
    results = RecurrenceResults.empty(k, v, chunks, output_final_state, for_backward)
    launch = launches_for(k.device, k.dtype, key_size, value_size).recurrence
    _recurrence_kernel[(chunks.num_segments * heads * (value_size // launch.tile),)](
        q=inputs.q,
        k=k,
        v=v,
        beta=inputs.beta,
        decays=local.decays,
        solve=local.solve,
        scores=local.scores,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        initial_state=initial_state,
        o=results.o,
        final_state=results.final_state,
        decayed_state=results.decayed_state,
        span_states=results.span_states,
        errors=results.errors,
        scale=inputs.scale,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        SPAN=SPAN,
        HAS_INITIAL_STATE=initial_state is not None,
        STORE_FINAL_STATE=output_final_state,
        FOR_BACKWARD=for_backward,
        LATE=launch.late,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return results
