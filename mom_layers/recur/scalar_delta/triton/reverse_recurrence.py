"""The reverse recurrence of the gated delta rule, from chunk to chunk against time.

Names as in `recurrence`. With dS the gradient of the state after the chunk, a chunk of the reverse recurrence is

    (9)   z = scale * P^T do + exp(G_last - G) * (k dS)       the gradient of beta * e
    (10)  y = z - X^T (beta * z)                              the transposed solve: the gradient of beta * r
    (11)  dS <- exp(G_last) dS + q^T (scale * exp(G) * do) - k^T (exp(G) * beta * y)

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.sums_triton import sum_of_vector
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.program_place_triton import segment_of_program
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, Inputs
from mom_layers.recur.scalar_delta.triton.chunk_local import PRECISION
from mom_layers.recur.scalar_delta.triton.launches import launches_for


@triton.jit
def _reverse_recurrence_kernel(
    q,
    k,
    beta,
    decays,
    solve,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    span_states,
    decayed_state,
    d_final_state,
    d_initial_state,
    d_span_states,
    d_errors,
    boundary,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    HAS_D_FINAL_STATE: tl.constexpr,
    STORE_D_INITIAL_STATE: tl.constexpr,
    LATE: tl.constexpr,
):
    """Equations (9) to (11) for BV columns of dS along one segment and head, from its last chunk to its first.

    Stores y; where a span ends, also dS and these columns' part of <S, dS>.
    """
    i_v, i_h, i_s, i_first, num_rows = segment_of_program(cu_seqlens, H, V // BV)
    num_chunks = tl.cdiv(num_rows, BT)
    i_first_chunk = tl.load(chunk_offsets + i_s)

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

    # dS after the last chunk. Of S there, only the part that has decayed enters <S, dS> (see state_gradients).
    if HAS_D_FINAL_STATE:
        b_dS = tl.load(d_final_state + i_state + o_kv).to(tl.float32)  # [K, BV]
        b_decayed = tl.load(decayed_state + i_state + o_kv, mask=num_rows > 0, other=0.0).to(tl.float32)  # [K, BV]
        last_boundary = sum_of_vector(tl.sum(b_decayed * b_dS, 1))  # [1]
    else:
        b_dS = tl.zeros([K, BV], tl.float32)
        last_boundary = tl.zeros([1], tl.float32)
    for i_back in range(0, num_chunks):
        # The chunk's rows and what chunk_local computed of them.
        i_t = num_chunks - 1 - i_back
        m_t = i_t * BT + o_t < num_rows
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_first_chunk + i_t).to(tl.int64) * H + i_h
        if not LATE:
            b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(decays + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(decays + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(decays + i_chunk * 2 * BT + BT - 1)
        if not LATE:
            b_X = tl.load(solve + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]

        # Where a span ends: dS, and its product with S, which the forward pass stored before the next span.
        b_dS_low = b_dS.to(low)
        if (i_t % SPAN == SPAN - 1) | (i_back == 0):
            i_span = (tl.load(span_offsets + i_s) + i_t // SPAN).to(tl.int64) * H + i_h
            tl.store(d_span_states + i_span * K * V + o_kv, b_dS_low)
            product = last_boundary
            if i_back > 0:
                b_S = tl.load(span_states + (i_span + H) * K * V + o_kv).to(tl.float32)  # [K, BV]
                product = sum_of_vector(tl.sum(b_S * b_dS, 1))
            tl.store(boundary + i_span * (V // BV) + i_v + tl.arange(0, 1), product)
        # (9) and (10): the gradient of e, and through the solve the gradient of r.
        b_z = scale * tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        if LATE:
            b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_z += b_to_end * tl.dot(b_k, b_dS_low, input_precision=PRECISION)
        if LATE:
            b_X = tl.load(solve + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_y = b_z - tl.dot(tl.trans(b_X), (b_beta * b_z).to(low), input_precision=PRECISION)
        tl.store(d_errors + rows * V + o_tv, b_y.to(low), mask=m_t[:, None])

        # (11): the gradient of the state before the chunk.
        b_dS = chunk_decay * b_dS
        b_k_side = (-b_from_start * b_beta * b_y).to(low)
        if LATE:
            b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K], which X has displaced
        b_dS += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_q_side = (scale * b_from_start * b_do.to(tl.float32)).to(low)
        b_dS += tl.dot(tl.trans(b_q), b_q_side, input_precision=PRECISION)
    if STORE_D_INITIAL_STATE:
        tl.store(d_initial_state + i_state + o_kv, b_dS)


def reverse_recurrence(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    span_states: torch.Tensor,
    decayed_state: torch.Tensor | None,
    d_final_state: torch.Tensor | None,
    store_d_initial_state: bool,
    launches_for=launches_for,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Equations (9) to (11) along every segment.

    Args:
        inputs, local, chunks: of the same rows.
        do: [R, H, V], contiguous.
        span_states: [M, H, K, V], the state before every span.
        decayed_state: [S, H, K, V], needed where there is a d_final_state.
        d_final_state: [S, H, K, V] float32, contiguous; zeros when absent.
        store_d_initial_state: also return the gradient of the initial state.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        d_errors: [R, H, V], y.
        d_span_states: [M, H, K, V], dS after every span.
        boundary: [M, H, parts] float32, <S, dS> after every span, in parts of V.
        d_initial_state: [S, H, K, V] float32, or None.
    """
    k, (_, heads, value_size) = inputs.k, do.shape
    key_size = k.shape[2]
    launch = launches_for(k.device, k.dtype, key_size, value_size).recurrence
    parts = value_size // launch.tile
    d_initial_state = None
    if store_d_initial_state:
        d_initial_state = k.new_empty(chunks.num_segments, heads, key_size, value_size, dtype=torch.float32)
    d_errors, d_span_states = torch.empty_like(do), torch.empty_like(span_states)
    boundary = torch.empty(chunks.num_span_slots, heads, parts, dtype=torch.float32, device=k.device)
    _reverse_recurrence_kernel[(chunks.num_segments * heads * parts,)](
        q=inputs.q,
        k=k,
        beta=inputs.beta,
        decays=local.decays,
        solve=local.solve,
        scores=local.scores,
        do=do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        span_states=span_states,
        decayed_state=decayed_state,
        d_final_state=d_final_state,
        d_initial_state=d_initial_state,
        d_span_states=d_span_states,
        d_errors=d_errors,
        boundary=boundary,
        scale=inputs.scale,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        SPAN=SPAN,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=store_d_initial_state,
        LATE=launch.late,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return d_errors, d_span_states, boundary, d_initial_state
