"""The recurrence from chunk to chunk, along time.

With q~, k~, E~, X, P and the decays of `chunk_local`, and S the state at the chunk's start:

    (7)   r = write * v - E~ S                    what the rows would write if none of them saw the others
    (8)   e = r - X r                             what the rows write
    (9)   o = q~ S + P e
    (10)  S <- diag(decays) S + k~^T e

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_delta.tensors import ChunkLocal, Inputs, RecurrenceResults, Values
from mom_layers.recur.channel_delta.triton.launches import launches_for
from mom_layers.recur.channel_delta.triton.levels import PRECISION
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.program_place_triton import segment_of_program
from mom_layers.recur.tiles_triton import tile_mask


@triton.jit
def _recurrence_kernel(
    q_decayed,
    k_decayed,
    erase_decayed,
    v,
    write,
    decays,
    solve,
    scores,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    initial_state,
    o,
    final_state,
    span_states,
    errors,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    WRITE_CHANNELS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
    LATE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Equations (7) to (10) for BV columns of the state along one segment and head.

    For the backward pass it also stores e and the state before every span.
    """
    TILES: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_s, i_first, num_rows = segment_of_program(cu_seqlens, H, TILES)
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
    m_kv = tile_mask(o_k < K, o_v, V, BV * TILES)
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = v.dtype.element_ty

    # S stays in registers, in float32; products read it rounded to the inputs' type.
    if HAS_INITIAL_STATE:
        b_S = tl.load(initial_state + i_state + o_kv, mask=m_kv, other=0.0).to(tl.float32)  # [K, BV]
    else:
        b_S = tl.zeros([K, BV], tl.float32)
    if AHEAD:
        # The rows that a chunk's first product reads are loaded while the chunk before ends.
        m_t = o_t < num_rows
        b_E = tl.load(erase_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
    for i_t in range(0, tl.cdiv(num_rows, BT)):
        m_t = i_t * BT + o_t < num_rows
        m_tv = tile_mask(m_t, o_v, V, BV * TILES)
        b_v = tl.load(v + rows * V + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [BT, BV]
        if WRITE_CHANNELS:
            b_write = tl.load(write + rows * V + o_tv, mask=m_tv, other=0.0).to(tl.float32)  # [BT, BV]
        else:
            b_write = tl.load(write + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_X = tl.load(solve + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_decay = tl.load(decays + i_chunk * K + o_k)[:, None]  # [K, 1]
        if not LATE:
            b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
            b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]

        if not AHEAD:
            b_E = tl.load(erase_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        # (7) and (8). The backward pass reads e, and a state a span.
        b_S_low = b_S.to(low)
        b_r = b_write * b_v - tl.dot(b_E, b_S_low, input_precision=PRECISION)
        b_e = (b_r - tl.dot(b_X, b_r.to(low), input_precision=PRECISION)).to(low)
        if FOR_BACKWARD:
            tl.store(errors + rows * V + o_tv, b_e, mask=m_tv)
            if i_t % SPAN == 0:
                i_span = (tl.load(span_offsets + i_s) + i_t // SPAN).to(tl.int64) * H + i_h
                tl.store(span_states + i_span * K * V + o_kv, b_S_low, mask=m_kv)
        # (9): what the rows read, from the state and from the chunk's rows.
        if LATE:
            b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_o = tl.dot(b_q, b_S_low, input_precision=PRECISION)
        b_o += tl.dot(b_P, b_e, input_precision=PRECISION)
        tl.store(o + rows * V + o_tv, b_o.to(low), mask=m_tv)
        if AHEAD:
            m_next = (i_t + 1) * BT + o_t < num_rows
            b_E = tl.load(erase_decayed + (rows + BT * H) * K + o_tk, mask=m_next[:, None], other=0.0)  # [BT, K]
        # (10): the state after the chunk.
        b_S = b_decay * b_S
        if LATE:
            b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K], which q has displaced
        b_S += tl.dot(tl.trans(b_k), b_e, input_precision=PRECISION)
        rows += BT * H
        i_chunk += H
    if STORE_FINAL_STATE:
        tl.store(final_state + i_state + o_kv, b_S, mask=m_kv)


def recurrence(
    *,
    inputs: Inputs,
    values: Values,
    local: ChunkLocal,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    for_backward: bool,
    launches_for=launches_for,
) -> RecurrenceResults:
    """Equations (7) to (10) along every segment.

    Args:
        inputs, values, local, chunks: of the same rows.
        initial_state: [S, H, K, V] float32, contiguous; zeros when absent.
        output_final_state: also fill the final state.
        for_backward: also fill what the backward pass reads.
        launches_for: a kernel set's, with fields as the general set's.
    """
    v, heads, k_dim = values.v, inputs.num_heads, inputs.k_dim
    v_dim = v.shape[2]
    final_state = errors = span_states = None
    if output_final_state:
        final_state = v.new_empty(chunks.num_segments, heads, k_dim, v_dim, dtype=torch.float32)
    if for_backward:
        errors = torch.empty_like(v)
        span_states = v.new_empty(chunks.num_span_slots, heads, k_dim, v_dim)
    results = RecurrenceResults(torch.empty_like(v), final_state, errors, span_states)
    launch = launches_for(v.device, v.dtype, k_dim, v_dim).recurrence
    launch = launch.for_columns(chunks.num_segments * heads, v_dim)
    _recurrence_kernel[(chunks.num_segments * heads * triton.cdiv(v_dim, launch.tile),)](
        q_decayed=local.q_decayed,
        k_decayed=local.k_decayed,
        erase_decayed=local.erase_decayed,
        v=v,
        write=values.write,
        decays=local.decays,
        solve=local.solve,
        scores=local.scores,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        initial_state=initial_state,
        o=results.o,
        final_state=final_state,
        span_states=span_states,
        errors=errors,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        SPAN=SPAN,
        WRITE_CHANNELS=values.writes_channels,
        HAS_INITIAL_STATE=initial_state is not None,
        STORE_FINAL_STATE=output_final_state,
        FOR_BACKWARD=for_backward,
        LATE=launch.late,
        AHEAD=launch.num_stages == 1,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return results
