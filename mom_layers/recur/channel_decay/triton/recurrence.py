"""Gated linear attention: the recurrence from chunk to chunk, along time.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, span slots M.

With q~, k~, P and the decays of `chunk_local`, and S the state at the chunk's start:

    (6)  o = q~ S + P v
    (7)  S <- diag(decays) S + k~^T v
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import SPAN, ChunkLocal, Inputs
from mom_layers.recur.channel_decay.triton.chunk_local import PRECISION
from mom_layers.recur.channel_decay.triton.launches import for_states, launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import segment_of_program


@triton.jit
def _recurrence_kernel(
    q_decayed,
    k_decayed,
    v,
    decays,
    scores,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    initial_state,
    o,
    final_state,
    span_states,
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
    """BV columns of the state along one segment and head."""
    i_v, i_h, i_s, i_first, num_rows = segment_of_program(cu_seqlens, H, V // BV)
    i_chunk = tl.load(chunk_offsets + i_s).to(tl.int64) * H + i_h
    rows = i_first.to(tl.int64) * H + i_h

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = v.dtype.element_ty

    if HAS_INITIAL_STATE:
        b_S = tl.load(initial_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_S = tl.zeros([K, BV], tl.float32)
    for i_t in range(0, tl.cdiv(num_rows, BT)):
        m_t = (i_t * BT + o_t < num_rows)[:, None]
        b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        if not LATE:
            b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_decay = tl.load(decays + i_chunk * K + o_k)[:, None]  # [K, 1]
        b_S_low = b_S.to(low)

        # The state at every span's start, for the backward pass.
        if FOR_BACKWARD:
            if i_t % SPAN == 0:
                i_span = (tl.load(span_offsets + i_s) + i_t // SPAN).to(tl.int64) * H + i_h
                tl.store(span_states + i_span * K * V + o_kv, b_S_low)

        # Equation (6).
        b_o = tl.dot(b_q, b_S_low, input_precision=PRECISION)
        b_o += tl.dot(b_P, b_v, input_precision=PRECISION)
        tl.store(o + rows * V + o_tv, b_o.to(low), mask=m_t)

        # Equation (7).
        b_S = b_decay * b_S
        if LATE:
            b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_S += tl.dot(tl.trans(b_k), b_v, input_precision=PRECISION)
        rows += BT * H
        i_chunk += H
    if STORE_FINAL_STATE:
        tl.store(final_state + i_state + o_kv, b_S)


def recurrence(
    *,
    inputs: Inputs,
    local: ChunkLocal,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    for_backward: bool,
    launches_for=launches_for,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Equations (6) and (7) along every segment.

    Args:
        inputs, local, chunks: of the same rows.
        initial_state: [S, H, K, V] float32, contiguous; zeros when absent.
        output_final_state: also store the state after each segment.
        for_backward: also store the state at the start of each span, which the backward pass reads.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        o [R, H, V], the final state [S, H, K, V] float32 or None, the states of the spans [M, H, K, V] in v's type or
        None.
    """
    v, heads, k_dim, v_dim = inputs.v, inputs.num_heads, inputs.k_dim, inputs.v_dim
    o = torch.empty_like(v)
    final_state = span_states = None
    if output_final_state:
        final_state = v.new_empty(chunks.num_segments, heads, k_dim, v_dim, dtype=torch.float32)
    if for_backward:
        span_states = v.new_empty(chunks.num_span_slots, heads, k_dim, v_dim)
    launch = launches_for(v.device, v.dtype, k_dim, v_dim).recurrence
    launch = for_states(launch, v_dim, chunks.num_segments * heads)
    _recurrence_kernel[(chunks.num_segments * heads * (v_dim // launch.tile),)](
        q_decayed=local.q_decayed,
        k_decayed=local.k_decayed,
        v=v,
        decays=local.decays,
        scores=local.scores,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        initial_state=initial_state,
        o=o,
        final_state=final_state,
        span_states=span_states,
        H=heads,
        K=k_dim,
        V=v_dim,
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
    return o, final_state, span_states
