"""Both recurrences for Hopper, in one kernel. Names and equations as in `triton.recurrence` and
`triton.reverse_recurrence`.

With M the state of the walk, the two are

    (6), (7)  with time     o = q~ M + P v       M <- diag(decays) M + k~^T v
    (8), (9)  against time  dv = k~ M + P^T do   M <- diag(decays) M + q~^T do

so that one kernel walks over rows a (q~ or k~), b (the other) and c (v or do).

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mom_layers.common.triton_versions import fetch_tile, store_tile, thread_barrier
from mom_layers.recur.channel_decay.hopper.launches import recurrence_launch
from mom_layers.recur.channel_decay.tensors import SPAN, ChunkLocal, Inputs
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.hopper_tiles import (
    clear_rows,
    fetch,
    product_layout,
    publish,
    shared_layout,
    store_rows,
    store_state,
    tiles,
)


@gluon.jit
def _fetch_chunk(places, tensors, i_place, row, i_key, i_value, i_chunk_row, arrived):
    """Starts to copy a chunk's tiles of b, c and P to place ``i_place`` of two."""
    b, c, scores = tensors
    barrier = arrived.index(i_place)
    mbarrier.expect(barrier, b.block_type.nbytes + c.block_type.nbytes + scores.block_type.nbytes)
    fetch_tile(b, [row, i_key], barrier, places[0].index(i_place))
    fetch_tile(c, [row, i_value], barrier, places[1].index(i_place))
    fetch_tile(scores, [i_chunk_row, 0], barrier, places[2].index(i_place))


@gluon.jit
def recurrence_kernel(
    a,
    b,
    c,
    decays,
    scores,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    first_state,
    out,
    out_tiles,
    last_state,
    span_states,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    AGAINST_TIME: gl.constexpr,
    HAS_FIRST_STATE: gl.constexpr,
    STORE_LAST_STATE: gl.constexpr,
    STORE_SPANS: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BV columns of the state along one segment and head, from its first chunk to its last, or back AGAINST_TIME.

    The next chunk's b, c and P are fetched while this chunk is computed; a too where it has two places, STAGES, else as
    soon as the product that reads a is done. Results leave one chunk later.
    """
    low: gl.constexpr = a.dtype
    NW: gl.constexpr = num_warps
    step: gl.constexpr = -1 if AGAINST_TIME else 1
    # Tile, head and segment; the last segments start first: in a Mixture-of-Memories they are the longest ones.
    i_v = gl.program_id(0) % (V // BV)
    i_h = gl.program_id(0) // (V // BV) % H
    i_s = (gl.num_programs(0) - 1 - gl.program_id(0)) // (V // BV) // H
    i_first = gl.load(cu_seqlens + i_s)
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.cdiv(num_rows, BT)
    i_t = num_chunks - 1 if AGAINST_TIME else num_chunks * 0
    i_row = i_first + i_t * BT
    i_chunk = (gl.load(chunk_offsets + i_s) + i_t) * H + i_h
    i_key, i_value = i_h * K, i_h * V + i_v * BV

    # Accumulators: rows by columns of V, and the state.
    L_r: gl.constexpr = product_layout(BT, BV, NW)
    L_S: gl.constexpr = product_layout(K, BV, NW)
    s_a_all = gl.allocate_shared_memory(low, [STAGES, BT, K], shared_layout(BT, K, low))
    s_b_all = gl.allocate_shared_memory(low, [2, BT, K], shared_layout(BT, K, low))
    s_c_all = gl.allocate_shared_memory(low, [2, BT, BV], shared_layout(BT, BV, low))
    s_P_all = gl.allocate_shared_memory(low, [2, BT, BT], shared_layout(BT, BT, low))
    s_S_one = gl.allocate_shared_memory(low, [1, K, BV], shared_layout(K, BV, low))
    s_out_one = gl.allocate_shared_memory(low, [1, BT, BV], shared_layout(BT, BV, low))

    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, L_S))
    o_kv = o_k[:, None] * V + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_S)))[None, :]
    i_state = (i_s.to(gl.int64) * H + i_h) * K * V
    if HAS_FIRST_STATE:
        b_S = gl.load(first_state + i_state + o_kv)
    else:
        b_S = gl.zeros([K, BV], gl.float32, layout=L_S)

    # Barriers of the two places of b, c and P, then of the places of a.
    arrived = gl.allocate_shared_memory(gl.int64, [2 + STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 + STAGES):
        mbarrier.init(arrived.index(i), count=1)
    places, tensors = (s_b_all, s_c_all, s_P_all), (b, c, scores)
    if num_chunks > 0:
        fetch(s_a_all.index(0), a, i_row, i_key, arrived.index(2))
        _fetch_chunk(places, tensors, 0, i_row, i_key, i_value, i_chunk * BT, arrived)
    for i in range(num_chunks):
        left = num_rows - i_t * BT
        more = i + 1 < num_chunks
        next_row, next_chunk = i_row + step * BT, i_chunk + step * H
        i_place = i & 1
        # Always 0, which the compiler cannot see: it would keep the addresses of all products in registers.
        i_zero = (i_chunk.to(gl.int64) >> 62).to(gl.int32)
        i_a = i_place if STAGES == 2 else i_zero
        s_a, s_b, s_c, s_P = s_a_all.index(i_a), s_b_all.index(i_place), s_c_all.index(i_place), s_P_all.index(i_place)
        s_S, s_out = s_S_one.index(i_zero), s_out_one.index(i_zero)
        b_decay = gl.load(decays + i_chunk.to(gl.int64) * K + o_k)
        # Puts the state beside the tiles in shared memory. Rows past the segment's end are cleared, so that they do not
        # reach the state.
        s_S.store(b_S.to(low))
        mbarrier.wait(arrived.index(i_place), (i >> 1) & 1)
        if left < BT:
            clear_rows(s_b, left, BT, K, NW)
            clear_rows(s_c, left, BT, BV, NW)
        mbarrier.wait(arrived.index(2 + i_a), (i >> 1) & 1 if STAGES == 2 else i & 1)
        publish()
        if more:
            _fetch_chunk(places, tensors, 1 - i_place, next_row, i_key, i_value, next_chunk * BT, arrived)
            if STAGES == 2:
                fetch(s_a_all.index(1 - i_place), a, next_row, i_key, arrived.index(3 - i_place))
        # The results of the chunk before; against time that may be the segment's last one, which may be partial.
        if i > 0:
            if AGAINST_TIME and left < 2 * BT:
                rows_before = (i_row + BT).to(gl.int64) * H + i_h
                store_rows(out + rows_before * V + i_v * BV, s_out, left - BT, H * V, BT, BV, NW)
            else:
                store_tile(out_tiles, [i_row - step * BT, i_value], s_out)
        if STORE_SPANS:
            # The state at a span's start, or its gradient at a span's end.
            if ((i_t % SPAN == SPAN - 1) | (i == 0)) if AGAINST_TIME else (i_t % SPAN == 0):
                i_span = (gl.load(span_offsets + i_s) + i_t // SPAN).to(gl.int64) * H + i_h
                store_state(span_states + i_span * K * V + i_v * BV, s_S, K, V, BV, NW)
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_out = warpgroup_mma(s_a, s_S, zero, use_acc=False, is_async=True)
        b_out = warpgroup_mma(s_P.permute((1, 0)) if AGAINST_TIME else s_P, s_c, b_out, is_async=True)
        b_S = b_decay[:, None] * b_S
        b_S = warpgroup_mma(s_b.permute((1, 0)), s_c, b_S, is_async=True)
        b_out = warpgroup_mma_wait(1, deps=[b_out])
        tma.store_wait(pendings=0)
        thread_barrier()
        if STAGES == 1:
            if more:
                fetch(s_a, a, next_row, i_key, arrived.index(2))
        s_out.store(b_out.to(low))
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        i_t += step
        i_row, i_chunk = next_row, next_chunk
    if num_chunks > 0:
        # The walk's last results, masked: with time the tile may reach into the next segment.
        thread_barrier()
        i_t -= step
        rows = (i_first + i_t * BT).to(gl.int64) * H + i_h
        store_rows(out + rows * V + i_v * BV, s_out_one.index(0), num_rows - i_t * BT, H * V, BT, BV, NW)
    if STORE_LAST_STATE:
        gl.store(last_state + i_state + o_kv, b_S)


def _walk(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    first_state: torch.Tensor | None,
    store_last_state: bool,
    store_spans: bool,
    against_time: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """out [R, H, V], the last state [S, H, K, V] float32 or None, the states of the spans [M, H, K, V] or None."""
    (_, heads, k_dim), v_dim = a.shape, c.shape[2]
    out, last_state, span_states = torch.empty_like(c), None, None
    if store_last_state:
        last_state = c.new_empty(chunks.num_segments, heads, k_dim, v_dim, dtype=torch.float32)
    if store_spans:
        span_states = c.new_empty(chunks.num_span_slots, heads, k_dim, v_dim)
    launch = recurrence_launch(k_dim, v_dim, chunks.num_segments * heads)
    recurrence_kernel[(chunks.num_segments * heads * (v_dim // launch.tile),)](
        a=tiles(a, k_dim),
        b=tiles(b, k_dim),
        c=tiles(c, launch.tile),
        decays=local.decays,
        scores=tiles(local.scores, CHUNK),
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        first_state=first_state,
        out=out,
        out_tiles=tiles(out, launch.tile),
        last_state=last_state,
        span_states=span_states,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        SPAN=SPAN,
        STAGES=launch.stages,
        AGAINST_TIME=against_time,
        HAS_FIRST_STATE=first_state is not None,
        STORE_LAST_STATE=store_last_state,
        STORE_SPANS=store_spans,
        num_warps=launch.num_warps,
        num_stages=launch.stages,
    )
    return out, last_state, span_states


def recurrence(
    *,
    inputs: Inputs,
    local: ChunkLocal,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    for_backward: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As the general set's."""
    a, b = local.q_decayed, local.k_decayed
    return _walk(a, b, inputs.v, local, chunks, initial_state, output_final_state, for_backward, False)


def reverse_recurrence(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    d_final_state: torch.Tensor | None,
    store_d_initial_state: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As the general set's."""
    a, b = local.k_decayed, local.q_decayed
    dv, d_initial_state, d_span_states = _walk(
        a, b, do, local, chunks, d_final_state, store_d_initial_state, True, True
    )
    return dv, d_span_states, d_initial_state
