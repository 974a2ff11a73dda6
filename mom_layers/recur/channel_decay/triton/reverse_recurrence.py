"""Gated linear attention: the recurrence of the state's gradient from chunk to chunk, against time.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, span slots M.

With q~, k~, P and the decays of `chunk_local`, and dS the gradient of the state at the chunk's end:

    (8)  dv = P^T do + k~ dS
    (9)  dS <- diag(decays) dS + q~^T do
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
def _reverse_recurrence_kernel(
    q_decayed,
    k_decayed,
    decays,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    d_final_state,
    d_initial_state,
    d_span_states,
    dv,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_D_FINAL_STATE: tl.constexpr,
    STORE_D_INITIAL_STATE: tl.constexpr,
):
    """BV columns of dS along one segment and head, from its last chunk to its first."""
    i_v, i_h, i_s, i_first, num_rows = segment_of_program(cu_seqlens, H, V // BV)
    num_chunks = tl.cdiv(num_rows, BT)
    i_first_chunk = tl.load(chunk_offsets + i_s)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = do.dtype.element_ty

    if HAS_D_FINAL_STATE:
        b_dS = tl.load(d_final_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_dS = tl.zeros([K, BV], tl.float32)
    for i_back in range(0, num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = (i_t * BT + o_t < num_rows)[:, None]
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_first_chunk + i_t).to(tl.int64) * H + i_h
        b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_decay = tl.load(decays + i_chunk * K + o_k)[:, None]  # [K, 1]
        b_dS_low = b_dS.to(low)

        # dS at every span's end, for the state gradients.
        if (i_t % SPAN == SPAN - 1) | (i_back == 0):
            i_span = (tl.load(span_offsets + i_s) + i_t // SPAN).to(tl.int64) * H + i_h
            tl.store(d_span_states + i_span * K * V + o_kv, b_dS_low)

        # Equation (8).
        b_dv = tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        b_dv += tl.dot(b_k, b_dS_low, input_precision=PRECISION)
        tl.store(dv + rows * V + o_tv, b_dv.to(low), mask=m_t)

        # Equation (9).
        b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, K]
        b_dS = b_decay * b_dS
        b_dS += tl.dot(tl.trans(b_q), b_do, input_precision=PRECISION)
    if STORE_D_INITIAL_STATE:
        tl.store(d_initial_state + i_state + o_kv, b_dS)


def reverse_recurrence(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    d_final_state: torch.Tensor | None,
    store_d_initial_state: bool,
    launches_for=launches_for,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Equations (8) and (9) along every segment, against time.

    Args:
        inputs, local, chunks: of the same rows.
        do: [R, H, V], the gradient of o, contiguous.
        d_final_state: [S, H, K, V] float32, the gradient of the final state, contiguous; zeros when absent.
        store_d_initial_state: also store the gradient of the initial state.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        dv [R, H, V], dS at the end of each span [M, H, K, V] in v's type, and the gradient of the initial state
        [S, H, K, V] float32 or None.
    """
    heads, k_dim, v_dim = inputs.num_heads, inputs.k_dim, inputs.v_dim
    dv = torch.empty_like(do)
    d_span_states = do.new_empty(chunks.num_span_slots, heads, k_dim, v_dim)
    d_initial_state = None
    if store_d_initial_state:
        d_initial_state = do.new_empty(chunks.num_segments, heads, k_dim, v_dim, dtype=torch.float32)
    launch = launches_for(do.device, do.dtype, k_dim, v_dim).recurrence
    launch = for_states(launch, v_dim, chunks.num_segments * heads)
    _reverse_recurrence_kernel[(chunks.num_segments * heads * (v_dim // launch.tile),)](
        q_decayed=local.q_decayed,
        k_decayed=local.k_decayed,
        decays=local.decays,
        scores=local.scores,
        do=do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        d_final_state=d_final_state,
        d_initial_state=d_initial_state,
        d_span_states=d_span_states,
        dv=dv,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        SPAN=SPAN,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=store_d_initial_state,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dv, d_span_states, d_initial_state
