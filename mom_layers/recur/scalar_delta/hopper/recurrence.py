"""The recurrence for Hopper. Names and equations as in `triton.recurrence`.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mom_layers.common.triton_versions import store_tile, thread_barrier
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.hopper_tiles import (
    clear_rows,
    copy_layout,
    fetch,
    fetch_two,
    product_layout,
    publish,
    shared_layout,
    store_state,
    tiles,
)
from mom_layers.recur.scalar_delta.hopper.launches import recurrence_launch, recurrence_stages
from mom_layers.recur.scalar_delta.hopper.tiles import decay_of_chunk, fetch_chunk, row_factors
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, Inputs, RecurrenceResults


@gluon.jit
def recurrence_kernel(
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
    o_tiles,
    final_state,
    decayed_state,
    span_states,
    errors,
    error_tiles,
    scale,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr,
    STORE_FINAL_STATE: gl.constexpr,
    FOR_BACKWARD: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Equations (5) to (8) for BV columns of the state along one segment and head.

    For the backward pass it also stores e, the state before every span, and the decayed part of the final state. With
    two stages, AHEAD, all tiles of the next chunk are fetched while this chunk is computed; with one stage only k is,
    and the other tiles follow as soon as their places are free.
    """
    low: gl.constexpr = k.dtype
    NW: gl.constexpr = num_warps
    # Tile, head and segment; the last segments start first: in a Mixture-of-Memories they are the longest ones.
    i_v = gl.program_id(0) % (V // BV)
    i_h = gl.program_id(0) // (V // BV) % H
    i_s = (gl.num_programs(0) - 1 - gl.program_id(0)) // (V // BV) // H
    i_first = gl.load(cu_seqlens + i_s)
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.cdiv(num_rows, BT)
    i_chunk = gl.load(chunk_offsets + i_s) * H + i_h
    i_spans = gl.load(span_offsets + i_s)
    rows = i_first.to(gl.int64) * H + i_h

    # Accumulators: rows by columns of V, and the state. In shared memory k has two places, one for the next chunk; q, X
    # and P have as many as there are stages. The low-precision S is the right operand of the products with k and q.
    L_r: gl.constexpr = product_layout(BT, BV, NW)
    L_S: gl.constexpr = product_layout(K, BV, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_r)
    AHEAD: gl.constexpr = STAGES > 1
    s_k = gl.allocate_shared_memory(low, [2, BT, K], shared_layout(BT, K, low))
    s_q_all = gl.allocate_shared_memory(low, [STAGES, BT, K], shared_layout(BT, K, low))
    s_X_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], shared_layout(BT, BT, low))
    s_P_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], shared_layout(BT, BT, low))
    s_S_one = gl.allocate_shared_memory(low, [1, K, BV], shared_layout(K, BV, low))
    # Two places that swap after every chunk: one holds v (unless v is fetched a chunk ahead), then -beta r, then e; the
    # other holds exp(G_last - G) beta e and then the next v. s_u holds beta e and then o.
    s_turns = gl.allocate_shared_memory(low, [2, BT, BV], shared_layout(BT, BV, low))
    if AHEAD:
        s_v_all = gl.allocate_shared_memory(low, [2, BT, BV], shared_layout(BT, BV, low))
    else:
        s_v_all = s_turns
    s_u_one = gl.allocate_shared_memory(low, [1, BT, BV], shared_layout(BT, BV, low))

    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, L_S))
    o_kv = o_k[:, None] * V + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_S)))[None, :]
    i_state = (i_s.to(gl.int64) * H + i_h) * K * V

    if HAS_INITIAL_STATE:
        b_S = gl.load(initial_state + i_state + o_kv)
    else:
        b_S = gl.zeros([K, BV], gl.float32, layout=L_S)
    # One barrier for each tile, or pair of tiles, that is waited for.
    arrived = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(arrived.index(i), count=1)
    qX_arrived, vP_arrived = arrived.index(2), arrived.index(3)
    i_key, i_value = i_h * K, i_h * V + i_v * BV
    places, tensors = (s_k, s_q_all, s_v_all, s_X_all, s_P_all), (k, q, v, solve, scores)
    # The first chunk's tiles.
    if num_chunks > 0:
        if AHEAD:
            fetch_chunk(places, tensors, 0, i_first, i_key, i_value, i_chunk * BT, arrived)
        else:
            fetch(s_k.index(0), k, i_first, i_key, arrived.index(0))
            fetch_two(s_q_all.index(0), q, i_first, i_key, s_X_all.index(0), solve, i_chunk * BT, 0, qX_arrived)
            fetch_two(s_v_all.index(0), v, i_first, i_value, s_P_all.index(0), scores, i_chunk * BT, 0, vP_arrived)
    if AHEAD:
        b_beta, b_from_start, b_to_end = row_factors(beta, decays, rows, i_chunk.to(gl.int64), num_rows, H, BT, L_t)
        chunk_decay = decay_of_chunk(decays, i_chunk.to(gl.int64), num_rows, BT)
    for i_t in range(num_chunks):
        left = num_rows - i_t * BT
        i_buffer = i_t & 1
        m_t = gl.arange(0, BT, layout=L_t) < left
        # Always 0, which the compiler cannot see: it would keep the addresses of all products in registers.
        i_zero = (rows >> 62).to(gl.int32)
        i_stage = i_buffer if AHEAD else i_zero
        s_q, s_X, s_P = s_q_all.index(i_stage), s_X_all.index(i_stage), s_P_all.index(i_stage)
        s_S = s_S_one.index(i_zero)
        s_u = s_u_one.index(i_zero)
        s_r, s_end = s_turns.index(i_buffer), s_turns.index(1 - i_buffer)
        # Puts S beside k in shared memory, starts to fetch from the next chunk, and stores o and e of the chunk before.
        s_S.store(b_S.to(low))
        mbarrier.wait(arrived.index(i_buffer), (i_t >> 1) & 1)
        if left < BT:
            clear_rows(s_k.index(i_buffer), left, BT, K, NW)
        publish()
        if left > BT:
            if AHEAD:
                fetch_chunk(places, tensors, 1 - i_buffer, i_first + BT, i_key, i_value, (i_chunk + H) * BT, arrived)
            else:
                fetch(s_k.index(1 - i_buffer), k, i_first + BT, i_key, arrived.index(1 - i_buffer))
        if i_t > 0:
            store_tile(o_tiles, [i_first - BT, i_value], s_u)
            if FOR_BACKWARD:
                store_tile(error_tiles, [i_first - BT, i_value], s_end)
        if FOR_BACKWARD:
            if i_t % SPAN == 0:
                i_span = (i_spans + i_t // SPAN).to(gl.int64) * H + i_h
                store_state(span_states + i_span * K * V + i_v * BV, s_S, K, V, BV, NW)
        # (5), with q S of (7) in flight at the same time. Of v, rows past the segment's end are masked here.
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_kS = warpgroup_mma(s_k.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        if not AHEAD:
            mbarrier.wait(qX_arrived, i_buffer)
        b_qS = warpgroup_mma(s_q, s_S, zero, use_acc=False, is_async=True)
        if AHEAD:
            next_beta, next_from_start, next_to_end = row_factors(
                beta, decays, rows + BT * H, (i_chunk + H).to(gl.int64), left - BT, H, BT, L_t
            )
            next_decay = decay_of_chunk(decays, (i_chunk + H).to(gl.int64), left - BT, BT)
        else:
            b_beta, b_from_start, b_to_end = row_factors(beta, decays, rows, i_chunk.to(gl.int64), left, H, BT, L_t)
            chunk_decay = decay_of_chunk(decays, i_chunk.to(gl.int64), left, BT)
            mbarrier.wait(vP_arrived, i_buffer)
        b_v = gl.where(m_t[:, None], s_v_all.index(i_buffer).load(L_r).to(gl.float32), 0.0)
        b_kS = warpgroup_mma_wait(1, deps=[b_kS])
        b_r = b_v - b_from_start[:, None] * b_kS
        s_r.store((-b_beta[:, None] * b_r).to(low))
        tma.store_wait(pendings=0)
        publish()
        # (6): s_r holds -beta r, so the product with X is added to r.
        b_e = warpgroup_mma(s_X, s_r, b_r, is_async=True)
        b_e, b_qS = warpgroup_mma_wait(0, deps=[b_e, b_qS])
        b_u = b_beta[:, None] * b_e
        s_end.store((b_to_end[:, None] * b_u).to(low))
        s_u.store(b_u.to(low))
        # (8) and the rest of (7): beta e goes to the state and, through P, to the chunk's own rows.
        b_S = chunk_decay * b_S
        if FOR_BACKWARD and STORE_FINAL_STATE:
            if left <= BT:
                gl.store(decayed_state + i_state + o_kv, b_S.to(low))
        publish()
        b_S_next = warpgroup_mma(s_k.index(i_buffer).permute((1, 0)), s_end, b_S, is_async=True)
        b_o = warpgroup_mma(s_P, s_u, b_from_start[:, None] * b_qS, is_async=True)
        if not AHEAD:
            if left > BT:
                fetch_two(s_q, q, i_first + BT, i_key, s_X, solve, (i_chunk + H) * BT, 0, qX_arrived)
        if FOR_BACKWARD:
            s_r.store(b_e.to(low))
        b_S, b_o = warpgroup_mma_wait(0, deps=[b_S_next, b_o])
        thread_barrier()
        if not AHEAD:
            if left > BT:
                fetch_two(s_end, v, i_first + BT, i_value, s_P, scores, (i_chunk + H) * BT, 0, vP_arrived)
        s_u.store((scale * b_o).to(low))
        if AHEAD:
            chunk_decay = next_decay
            b_beta, b_from_start, b_to_end = next_beta, next_from_start, next_to_end
        rows += BT * H
        i_first += BT
        i_chunk += H
    # The last chunk's results, masked: its tile may reach into the next segment.
    if num_chunks > 0:
        thread_barrier()
        L_io: gl.constexpr = copy_layout(BV, NW)
        o_t = gl.arange(0, BT, layout=gl.SliceLayout(1, L_io))
        o_tv = o_t[:, None] * (H * V) + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_io)))[None, :]
        # Loaded again: from the loop's counters the compiler would keep an address for every store.
        end = gl.load(cu_seqlens + i_s + 1)
        start = end - 1 - (num_rows - 1) % BT
        m_tv = (o_t < end - start)[:, None]
        o_tv += (start.to(gl.int64) * H + i_h) * V
        gl.store(o + o_tv, s_u_one.index(0).load(L_io), mask=m_tv)
        if FOR_BACKWARD:
            gl.store(errors + o_tv, s_turns.index(1 - num_chunks & 1).load(L_io), mask=m_tv)
    if STORE_FINAL_STATE:
        gl.store(final_state + i_state + o_kv, b_S)


def recurrence(
    *,
    inputs: Inputs,
    v: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    for_backward: bool,
) -> RecurrenceResults:
    """As the general set's."""
    k, (_, heads, value_size) = inputs.k, v.shape
    key_size = k.shape[2]
    results = RecurrenceResults.empty(k, v, chunks, output_final_state, for_backward)
    launch = recurrence_launch(key_size, value_size, chunks.num_segments * heads)
    stages = recurrence_stages(launch.tile)
    recurrence_kernel[(chunks.num_segments * heads * (value_size // launch.tile),)](
        q=tiles(inputs.q, key_size),
        k=tiles(k, key_size),
        v=tiles(v, launch.tile),
        beta=inputs.beta,
        decays=local.decays,
        solve=tiles(local.solve, CHUNK),
        scores=tiles(local.scores, CHUNK),
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        initial_state=initial_state,
        o=results.o,
        o_tiles=tiles(results.o, launch.tile),
        final_state=results.final_state,
        decayed_state=results.decayed_state,
        span_states=results.span_states,
        errors=results.errors,
        error_tiles=tiles(results.errors, launch.tile) if for_backward else None,
        scale=inputs.scale,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        SPAN=SPAN,
        STAGES=stages,
        HAS_INITIAL_STATE=initial_state is not None,
        STORE_FINAL_STATE=output_final_state,
        FOR_BACKWARD=for_backward,
        num_warps=launch.num_warps,
        num_stages=stages,
    )
    return results
