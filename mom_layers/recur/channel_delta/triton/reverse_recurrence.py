"""The recurrence from chunk to chunk, against time.

Names as in `recurrence`. With do the gradient of o, and dS the gradient of the state after the chunk:

    (11)  z = P^T do + k~ dS                      the gradient of e
    (12)  y = z - X^T z                           the gradient of r
    (13)  dS <- diag(decays) dS + q~^T do - E~^T y

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_delta.tensors import ChunkLocal, Inputs
from mom_layers.recur.channel_delta.triton.launches import launches_for
from mom_layers.recur.channel_delta.triton.levels import PRECISION
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import segment_of_program
from mom_layers.recur.tiles_triton import tile_mask


@triton.jit
def _reverse_recurrence_kernel(
    q_decayed,
    k_decayed,
    erase_decayed,
    decays,
    solve,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    d_final_state,
    d_initial_state,
    d_states,
    d_errors,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    HAS_D_FINAL_STATE: tl.constexpr,
    STORE_D_INITIAL_STATE: tl.constexpr,
    STORE_D_STATES: tl.constexpr,
    LATE: tl.constexpr,
):
    """Equations (11) to (13) for BV columns of dS along one segment and head. Stores y and the dS after every chunk."""
    TILES: tl.constexpr = (V + BV - 1) // BV
    i_v, i_h, i_s, i_first, num_rows = segment_of_program(cu_seqlens, H, TILES)
    num_chunks = tl.cdiv(num_rows, BT)
    i_chunk = (tl.load(chunk_offsets + i_s) + num_chunks - 1).to(tl.int64) * H + i_h
    rows = (i_first + (num_chunks - 1) * BT).to(tl.int64) * H + i_h

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    m_kv = tile_mask(o_k < K, o_v, V, BV * TILES)
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = do.dtype.element_ty

    if HAS_D_FINAL_STATE:
        b_dS = tl.load(d_final_state + i_state + o_kv, mask=m_kv, other=0.0).to(tl.float32)  # [K, BV]
    else:
        b_dS = tl.zeros([K, BV], tl.float32)
    for i_back in range(0, num_chunks):
        m_t = (num_chunks - 1 - i_back) * BT + o_t < num_rows
        m_tv = tile_mask(m_t, o_v, V, BV * TILES)
        b_do = tl.load(do + rows * V + o_tv, mask=m_tv, other=0.0)  # [BT, BV]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_decay = tl.load(decays + i_chunk * K + o_k)[:, None]  # [K, 1]
        if not LATE:
            b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
            b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
            b_E = tl.load(erase_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]

        # (11) and (12).
        b_dS_low = b_dS.to(low)
        if STORE_D_STATES:
            tl.store(d_states + i_chunk * K * V + o_kv, b_dS_low, mask=m_kv)
        b_z = tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        if LATE:
            b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_z += tl.dot(b_k, b_dS_low, input_precision=PRECISION)
        b_X = tl.load(solve + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_y = b_z - tl.dot(tl.trans(b_X), b_z.to(low), input_precision=PRECISION)
        if STORE_D_STATES:
            tl.store(d_errors + rows * V + o_tv, b_y.to(low), mask=m_tv)

        # (13): the gradient of the state before the chunk.
        b_dS = b_decay * b_dS
        if LATE:
            b_q = tl.load(q_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_dS += tl.dot(tl.trans(b_q), b_do, input_precision=PRECISION)
        if LATE:
            b_E = tl.load(erase_decayed + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_dS += tl.dot(tl.trans(b_E), (-b_y).to(low), input_precision=PRECISION)
        rows -= BT * H
        i_chunk -= H
    if STORE_D_INITIAL_STATE:
        tl.store(d_initial_state + i_state + o_kv, b_dS, mask=m_kv)


def reverse_recurrence(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    d_final_state: torch.Tensor | None,
    store_d_initial_state: bool,
    store_d_states: bool,
    launches_for=launches_for,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Equations (11) to (13) along every segment.

    Args:
        inputs, local, chunks: of the same rows.
        do: [R, H, V], contiguous.
        d_final_state: [S, H, K, V] float32, contiguous; zeros when absent.
        store_d_initial_state: also return the gradient of the initial state.
        store_d_states: return y and the gradients of the states.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        d_errors: [R, H, V], y, or None.
        d_states: [N, H, K, V] in do's type, dS after every chunk, or None.
        d_initial_state: [S, H, K, V] float32, or None.
    """
    heads, k_dim, v_dim = inputs.num_heads, inputs.k_dim, do.shape[2]
    launch = launches_for(do.device, do.dtype, k_dim, v_dim).recurrence
    launch = launch.for_columns(chunks.num_segments * heads, v_dim)
    d_errors = d_states = d_initial_state = None
    if store_d_initial_state:
        d_initial_state = do.new_empty(chunks.num_segments, heads, k_dim, v_dim, dtype=torch.float32)
    if store_d_states:
        d_errors, d_states = torch.empty_like(do), do.new_empty(chunks.num_slots, heads, k_dim, v_dim)
    _reverse_recurrence_kernel[(chunks.num_segments * heads * triton.cdiv(v_dim, launch.tile),)](
        q_decayed=local.q_decayed,
        k_decayed=local.k_decayed,
        erase_decayed=local.erase_decayed,
        decays=local.decays,
        solve=local.solve,
        scores=local.scores,
        do=do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        d_final_state=d_final_state,
        d_initial_state=d_initial_state,
        d_states=d_states,
        d_errors=d_errors,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=store_d_initial_state,
        STORE_D_STATES=store_d_states,
        LATE=launch.late,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return d_errors, d_states, d_initial_state
