"""The state at the start of every chunk, for the gradients, from the states that the recurrence stored once a span.

e is known, so that a chunk is equation (10) alone, and the tiles of a state do not depend on each other.

Shape legend: rows R, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_delta.tensors import ChunkLocal
from mom_layers.recur.channel_delta.triton.launches import launches_for
from mom_layers.recur.channel_delta.triton.levels import PRECISION
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.program_place_triton import rows_of_span, span_of_program


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_states_kernel(
    k_decayed,
    errors,
    decays,
    span_states,
    cu_seqlens,
    chunk_offsets,
    span_segment,
    span_index,
    states,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Equation (10) for a tile [BK, BV] of the state along one span and head."""
    i_tile, i_h, i_span, i_s = span_of_program(span_segment, H, (K // BK) * (V // BV))
    if i_s >= num_segments:
        return
    i_first, num_rows, num_chunks, i_slot = rows_of_span(cu_seqlens, chunk_offsets, span_index, i_span, i_s, BT, SPAN)
    o_t = tl.arange(0, BT)
    o_k = i_tile // (V // BV) * BK + tl.arange(0, BK)
    o_v = i_tile % (V // BV) * BV + tl.arange(0, BV)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    b_S = tl.load(span_states + (i_span.to(tl.int64) * H + i_h) * K * V + o_kv).to(tl.float32)  # [BK, BV]
    rows = i_first.to(tl.int64) * H + i_h
    i_chunk = i_slot.to(tl.int64) * H + i_h
    for i_t in range(0, num_chunks):
        m_t = (i_t * BT + o_t < num_rows)[:, None]
        tl.store(states + i_chunk * K * V + o_kv, b_S.to(states.dtype.element_ty))
        b_k = tl.load(k_decayed + rows * K + o_tk, mask=m_t, other=0.0)  # [BT, BK]
        b_e = tl.load(errors + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_S = tl.load(decays + i_chunk * K + o_k)[:, None] * b_S
        b_S += tl.dot(tl.trans(b_k), b_e, input_precision=PRECISION)
        rows += BT * H
        i_chunk += H


def chunk_states(
    *,
    local: ChunkLocal,
    errors: torch.Tensor,
    chunks: Chunks,
    span_states: torch.Tensor,
    launches_for=launches_for,
) -> torch.Tensor:
    """The state at the start of every chunk, [N, H, K, V] in span_states' type.

    Args:
        local, chunks: of the same rows.
        errors: [R, H, V], e.
        span_states: [M, H, K, V], from ``recurrence``.
        launches_for: a kernel set's, with fields as the general set's.
    """
    slots, heads, k_dim, v_dim = chunks.num_span_slots, *span_states.shape[1:]
    states = span_states.new_empty(chunks.num_slots, heads, k_dim, v_dim)
    launch = launches_for(errors.device, errors.dtype, k_dim, v_dim).chunk_states
    tile_k, tile_v = min(launch.tile, k_dim), min(launch.tile, v_dim)
    _chunk_states_kernel[(slots * heads * (k_dim // tile_k) * (v_dim // tile_v),)](
        k_decayed=local.k_decayed,
        errors=errors,
        decays=local.decays,
        span_states=span_states,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_segment=chunks.spans.segment,
        span_index=chunks.spans.index,
        states=states,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BK=tile_k,
        BV=tile_v,
        SPAN=SPAN,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return states
