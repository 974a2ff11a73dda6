"""Gated linear attention: what the states give to dq, dk and dg.

Shape legend: rows R, heads H, key size K, value size V, chunk length BT, span slots M.

Sums of g and the decays are written as in `chunk_local`. S is the state at the chunk's start, dS the gradient of the
state at its end:

    (10)  S of the next chunk = diag(decays) S + k~^T v
    (11)  u = scale * do S^T
    (12)  w = v dS^T
    (13)  d_decays = decays * sum_V S * dS
    (14)  dS of the chunk before = diag(decays) dS + q~^T do

`local_gradients` makes gradients of u, w and d_decays: here nothing is summed over rows.

Memory holds S at the start and dS at the end of every span only. From these, the programs of a span compute the S and
dS of its chunks again, each program for BK of the K rows: the rows of a state do not depend on each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import SPAN, ChunkLocal, Inputs, StateParts
from mom_layers.recur.channel_decay.triton.chunk_local import PRECISION
from mom_layers.recur.channel_decay.triton.launches import launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import rows_of_span, span_of_program


@triton.jit(do_not_specialize=["num_segments"])
def _state_gradients_kernel(
    v,
    q_decayed,
    k_decayed,
    decays,
    do,
    span_states,
    d_span_states,
    cu_seqlens,
    chunk_offsets,
    span_segment,
    span_index,
    u,
    w,
    d_decays,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPAN: tl.constexpr,
    LATE: tl.constexpr,
):
    """BK rows of dS along one span and head, against time."""
    i_kb, i_h, i_span, i_s = span_of_program(span_segment, H, K // BK)
    if i_s >= num_segments:
        return
    i_first, num_rows, num_chunks, i_slot = rows_of_span(cu_seqlens, chunk_offsets, span_index, i_span, i_s, BT, SPAN)

    o_t = tl.arange(0, BT)
    o_k = i_kb * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    i_state = (i_span.to(tl.int64) * H + i_h) * K * V + o_k[:, None] * V + o_v[None, :]
    low = v.dtype.element_ty
    b_dS = tl.load(d_span_states + i_state).to(tl.float32)  # [BK, V]
    for i_back in range(0, num_chunks):
        # Equation (10), from the span's start for every chunk anew: 1.5 products more for each chunk of a span of four,
        # and no state of a chunk in memory. The chunks before this one are whole.
        i_t = num_chunks - 1 - i_back
        b_S = tl.load(span_states + i_state).to(tl.float32)  # [BK, V]
        for i in range(0, i_t):
            p_rows = (i_first + i * BT).to(tl.int64) * H + i_h
            b_k_earlier = tl.load(k_decayed + p_rows * K + o_tk)  # [BT, BK]
            b_v_earlier = tl.load(v + p_rows * V + o_tv)  # [BT, V]
            b_S = tl.load(decays + ((i_slot + i).to(tl.int64) * H + i_h) * K + o_k)[:, None] * b_S
            b_S += tl.dot(tl.trans(b_k_earlier), b_v_earlier, input_precision=PRECISION)

        # Equations (11) to (13).
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        m_t = (i_t * BT + o_t < num_rows)[:, None]
        p_tk = rows * K + o_tk
        i_decay = ((i_slot + i_t).to(tl.int64) * H + i_h) * K + o_k
        b_decay = tl.load(decays + i_decay)  # [BK]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, V]
        if not LATE:
            b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, V]
        b_u = scale * tl.dot(b_do, tl.trans(b_S.to(low)), input_precision=PRECISION)
        tl.store(u + p_tk, b_u.to(low), mask=m_t)
        if LATE:
            b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, V]
        b_w = tl.dot(b_v, tl.trans(b_dS.to(low)), input_precision=PRECISION)
        tl.store(w + p_tk, b_w.to(low), mask=m_t)
        tl.store(d_decays + i_decay, b_decay * tl.sum(b_S * b_dS, 1))

        # Equation (14).
        b_dS = b_decay[:, None] * b_dS
        b_q = tl.load(q_decayed + p_tk, mask=m_t, other=0.0)  # [BT, BK]
        if LATE:
            b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, V], which v has displaced
        b_dS += tl.dot(tl.trans(b_q), b_do, input_precision=PRECISION)


def state_gradients(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    span_states: torch.Tensor,
    d_span_states: torch.Tensor,
    launches_for=launches_for,
) -> StateParts:
    """Equations (10) to (14) of every span.

    Args:
        inputs, local, chunks: of the same rows.
        do: [R, H, V], the gradient of o, contiguous.
        span_states: [M, H, K, V], from ``recurrence``.
        d_span_states: [M, H, K, V], from ``reverse_recurrence``.
        launches_for: a kernel set's, with fields as the general set's.
    """
    v, heads, k_dim, v_dim = inputs.v, inputs.num_heads, inputs.k_dim, inputs.v_dim
    u, w, d_decays = torch.empty_like(inputs.q), torch.empty_like(inputs.k), torch.empty_like(local.decays)
    launch = launches_for(v.device, v.dtype, k_dim, v_dim).state_gradients
    _state_gradients_kernel[(chunks.num_span_slots * heads * (k_dim // launch.tile),)](
        v=v,
        q_decayed=local.q_decayed,
        k_decayed=local.k_decayed,
        decays=local.decays,
        do=do,
        span_states=span_states,
        d_span_states=d_span_states,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_segment=chunks.spans.segment,
        span_index=chunks.spans.index,
        u=u,
        w=w,
        d_decays=d_decays,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BK=launch.tile,
        SPAN=SPAN,
        LATE=launch.late,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return StateParts(u, w, d_decays)
