"""The reverse recurrence for Hopper. Names and equations as in `triton.reverse_recurrence`.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from mom_layers.common.triton_versions import thread_barrier
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
from mom_layers.recur.scalar_delta.hopper.tiles import decay_of_chunk, fetch_chunk, row_factors, state_product
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, Inputs


@gluon.jit
def reverse_recurrence_kernel(
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
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    SPAN: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_D_FINAL_STATE: gl.constexpr,
    STORE_D_INITIAL_STATE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Equations (9) to (11) for BV columns of dS along one segment and head, from its last chunk to its first.

    Stores y; where a span ends, also dS and these columns' part of <S, dS>. With two stages, AHEAD, all tiles of the
    next chunk are fetched while this chunk is computed; with one stage only k is, and the other tiles follow as soon as
    their places are free.
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
    i_spans = gl.load(span_offsets + i_s)
    i_chunk = (gl.load(chunk_offsets + i_s) + num_chunks - 1) * H + i_h
    i_row = i_first + (num_chunks - 1) * BT
    rows = i_row.to(gl.int64) * H + i_h

    # Accumulators: rows by columns of V, and dS. In shared memory k has two places, one for the next chunk; q, X and P
    # have as many as there are stages. The low-precision dS is the right operand of the product with k.
    L_r: gl.constexpr = product_layout(BT, BV, NW)
    L_S: gl.constexpr = product_layout(K, BV, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_r)
    AHEAD: gl.constexpr = STAGES > 1
    s_k = gl.allocate_shared_memory(low, [2, BT, K], shared_layout(BT, K, low))
    s_q_all = gl.allocate_shared_memory(low, [STAGES, BT, K], shared_layout(BT, K, low))
    s_X_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], shared_layout(BT, BT, low))
    s_P_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], shared_layout(BT, BT, low))
    s_S_one = gl.allocate_shared_memory(low, [1, K, BV], shared_layout(K, BV, low))
    # Two places that swap after every chunk: one holds do (unless do is fetched a chunk ahead) and then the factor of
    # k^T in (11), the other the factor of q^T and then the next do.
    s_turns = gl.allocate_shared_memory(low, [2, BT, BV], shared_layout(BT, BV, low))
    if AHEAD:
        s_do_all = gl.allocate_shared_memory(low, [2, BT, BV], shared_layout(BT, BV, low))
    else:
        s_do_all = s_turns
    s_z = gl.allocate_shared_memory(low, [BT, BV], shared_layout(BT, BV, low))  # -beta z, then y

    L_io: gl.constexpr = copy_layout(BV, NW)
    L_row: gl.constexpr = gl.SliceLayout(1, L_io)
    o_t = gl.arange(0, BT, layout=L_row)
    o_tv = o_t[:, None] * (H * V) + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_io)))[None, :]
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, L_S))
    o_kv = o_k[:, None] * V + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_S)))[None, :]
    i_state = (i_s.to(gl.int64) * H + i_h) * K * V

    # dS after the last chunk. Of S there, only the part that has decayed enters <S, dS> (see triton.state_gradients).
    if HAS_D_FINAL_STATE:
        b_dS = gl.load(d_final_state + i_state + o_kv)
        b_decayed = gl.load(decayed_state + i_state + o_kv, mask=(o_kv >= 0) & (num_rows > 0), other=0.0)
        product = gl.sum(gl.sum(b_decayed.to(gl.float32) * b_dS, 1), 0)
    else:
        b_dS = gl.zeros([K, BV], gl.float32, layout=L_S)
        product = gl.to_tensor(0.0)
    # One barrier for each tile, or pair of tiles, that is waited for.
    arrived = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(5):
        mbarrier.init(arrived.index(i), count=1)
    P_arrived, X_arrived, q_do_arrived = arrived.index(2), arrived.index(3), arrived.index(4)
    left = gl.where(num_chunks > 0, num_rows - (num_chunks - 1) * BT, 0)
    i_key, i_value = i_h * K, i_h * V + i_v * BV
    places, tensors = (s_k, s_q_all, s_do_all, s_X_all, s_P_all), (k, q, do, solve, scores)
    # The last chunk's tiles; where the segment ends inside the tiles, the next segment's rows are cleared.
    if num_chunks > 0:
        if AHEAD:
            fetch_chunk(places, tensors, 0, i_row, i_key, i_value, i_chunk * BT, arrived)
        else:
            fetch(s_k.index(0), k, i_row, i_key, arrived.index(0))
            fetch_two(s_q_all.index(0), q, i_row, i_key, s_do_all.index(0), do, i_row, i_value, q_do_arrived)
            fetch(s_P_all.index(0), scores, i_chunk * BT, 0, P_arrived)
            fetch(s_X_all.index(0), solve, i_chunk * BT, 0, X_arrived)
        gl.store(boundary + ((i_spans + (num_chunks - 1) // SPAN).to(gl.int64) * H + i_h) * (V // BV) + i_v, product)
        if left < BT:
            mbarrier.wait(arrived.index(0), 0)
            if not AHEAD:
                mbarrier.wait(q_do_arrived, 0)
            clear_rows(s_k.index(0), left, BT, K, NW)
            clear_rows(s_q_all.index(0), left, BT, K, NW)
            clear_rows(s_do_all.index(0), left, BT, BV, NW)
            thread_barrier()
    b_beta, b_from_start, b_to_end = row_factors(beta, decays, rows, i_chunk.to(gl.int64), left, H, BT, L_t)
    chunk_decay = decay_of_chunk(decays, i_chunk.to(gl.int64), left, BT)
    for i_back in range(num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = o_t < num_rows - i_t * BT
        i_buffer = i_back & 1
        s_do, s_y, s_start = s_do_all.index(i_buffer), s_turns.index(i_buffer), s_turns.index(1 - i_buffer)
        # Always 0, which the compiler cannot see: it would keep the addresses of all products in registers.
        i_zero = (rows >> 62).to(gl.int32)
        i_stage = i_buffer if AHEAD else i_zero
        s_q, s_X, s_P = s_q_all.index(i_stage), s_X_all.index(i_stage), s_P_all.index(i_stage)
        s_S = s_S_one.index(i_zero)
        # Puts dS and the factor of q^T in (11) beside k and P in shared memory, and starts to fetch the next chunk.
        s_S.store(b_dS.to(low))
        if AHEAD:
            mbarrier.wait(arrived.index(i_buffer), (i_back >> 1) & 1)
        else:
            mbarrier.wait(q_do_arrived, i_buffer)
        b_do = s_do.load(L_r).to(gl.float32)
        s_start.store(((scale * b_from_start)[:, None] * b_do).to(low))
        if not AHEAD:
            mbarrier.wait(arrived.index(i_buffer), (i_back >> 1) & 1)
            mbarrier.wait(P_arrived, i_buffer)
        publish()
        if i_t > 0:
            if AHEAD:
                fetch_chunk(places, tensors, 1 - i_buffer, i_row - BT, i_key, i_value, (i_chunk - H) * BT, arrived)
            else:
                fetch(s_k.index(1 - i_buffer), k, i_row - BT, i_key, arrived.index(1 - i_buffer))
        # Where a span ends: dS, and its product with S, which the forward pass stored before the next span.
        if (i_t % SPAN == SPAN - 1) | (i_back == 0):
            i_span = (i_spans + i_t // SPAN).to(gl.int64) * H + i_h
            store_state(d_span_states + i_span * K * V + i_v * BV, s_S, K, V, BV, NW)
            if i_back > 0:
                after = span_states + (i_span + H) * K * V + i_v * BV
                gl.store(boundary + i_span * (V // BV) + i_v, state_product(after, s_S, K, V, BV, NW))
        # (9); meanwhile the next chunk's factors are loaded.
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_kdS = warpgroup_mma(s_k.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        b_Pdo = warpgroup_mma(s_P.permute((1, 0)), s_do, zero, use_acc=False, is_async=True)
        next_beta, next_from_start, next_to_end = row_factors(
            beta, decays, rows - BT * H, (i_chunk - H).to(gl.int64), gl.where(i_t > 0, BT, 0), H, BT, L_t
        )
        next_decay = decay_of_chunk(decays, (i_chunk - H).to(gl.int64), i_t, BT)
        b_kdS, b_Pdo = warpgroup_mma_wait(0, deps=[b_kdS, b_Pdo])
        b_z = scale * b_Pdo + b_to_end[:, None] * b_kdS
        s_z.store((-b_beta[:, None] * b_z).to(low))
        b_dS = chunk_decay * b_dS
        if not AHEAD:
            mbarrier.wait(X_arrived, i_buffer)
        publish()
        if not AHEAD:
            if i_t > 0:
                fetch(s_P, scores, (i_chunk - H) * BT, 0, P_arrived)
        # (10): s_z holds -beta z, so the product with X^T is added to z. (11) with q at the same time, then with k.
        b_y = warpgroup_mma(s_X.permute((1, 0)), s_z, b_z, is_async=True)
        b_dS_next = warpgroup_mma(s_q.permute((1, 0)), s_start, b_dS, is_async=True)
        b_y = warpgroup_mma_wait(1, deps=[b_y])
        s_y.store(((-b_from_start * b_beta)[:, None] * b_y).to(low))
        publish()
        if not AHEAD:
            if i_t > 0:
                fetch(s_X, solve, (i_chunk - H) * BT, 0, X_arrived)
        b_dS_next = warpgroup_mma(s_k.index(i_buffer).permute((1, 0)), s_y, b_dS_next, is_async=True)
        s_z.store(b_y.to(low))
        b_dS = warpgroup_mma_wait(0, deps=[b_dS_next])
        thread_barrier()
        if not AHEAD:
            if i_t > 0:
                fetch_two(s_q, q, i_row - BT, i_key, s_start, do, i_row - BT, i_value, q_do_arrived)
        gl.store(d_errors + rows * V + o_tv, s_z.load(L_io), mask=m_t[:, None])
        chunk_decay = next_decay
        b_beta, b_from_start, b_to_end = next_beta, next_from_start, next_to_end
        rows -= BT * H
        i_row -= BT
        i_chunk -= H
    if STORE_D_INITIAL_STATE:
        gl.store(d_initial_state + i_state + o_kv, b_dS)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As the general set's."""
    k, (_, heads, value_size) = inputs.k, do.shape
    key_size = k.shape[2]
    launch = recurrence_launch(key_size, value_size, chunks.num_segments * heads)
    parts, stages = value_size // launch.tile, recurrence_stages(launch.tile)
    d_initial_state = None
    if store_d_initial_state:
        d_initial_state = k.new_empty(chunks.num_segments, heads, key_size, value_size, dtype=torch.float32)
    d_errors, d_span_states = torch.empty_like(do), torch.empty_like(span_states)
    boundary = torch.empty(chunks.num_span_slots, heads, parts, dtype=torch.float32, device=k.device)
    reverse_recurrence_kernel[(chunks.num_segments * heads * parts,)](
        q=tiles(inputs.q, key_size),
        k=tiles(k, key_size),
        beta=inputs.beta,
        decays=local.decays,
        solve=tiles(local.solve, CHUNK),
        scores=tiles(local.scores, CHUNK),
        do=tiles(do, launch.tile),
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
        STAGES=stages,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=store_d_initial_state,
        num_warps=launch.num_warps,
        num_stages=stages,
    )
    return d_errors, d_span_states, boundary, d_initial_state
