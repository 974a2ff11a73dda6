"""What the states give to dq, dk and dg, for Hopper. Names and equations as in `triton.state_gradients`.

Shape legend: rows R, heads H, key size K, value size V, chunk length BT, span slots M.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mom_layers.common.triton_versions import store_tile, thread_barrier
from mom_layers.recur.channel_decay.hopper.launches import state_gradients_launch
from mom_layers.recur.channel_decay.tensors import SPAN, ChunkLocal, Inputs, StateParts
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.hopper_tiles import (
    clear_rows,
    fetch,
    fetch_two,
    product_layout,
    publish,
    shared_layout,
    store_rows,
    tiles,
)


@gluon.jit(do_not_specialize=["num_segments"])
def state_gradients_kernel(
    q_decayed,
    k_decayed,
    v,
    do,
    decays,
    states,
    d_states,
    cu_seqlens,
    chunk_offsets,
    span_segment,
    span_index,
    u,
    w,
    u_tiles,
    w_tiles,
    d_decays,
    scale,
    num_segments,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BK: gl.constexpr,
    SPAN: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BK rows of S and dS along one span and head.

    First S of every chunk, with time, each to a place in shared memory; then u, w and dS, against time. Of the SPAN
    places, place i - 1 holds S of chunk i, and after chunk i dS of the chunk before; the last one holds dS of the last
    chunk, and then S of the first one, which is fetched again.

    Of a chunk's rows, v and do, and k~ and q~, share two places each: with time both hold v and k~, of this chunk and
    of the next one.
    """
    low: gl.constexpr = q_decayed.dtype
    NW: gl.constexpr = num_warps
    i_kb = gl.program_id(0) % (K // BK)
    i_h = gl.program_id(0) // (K // BK) % H
    i_span = gl.program_id(0) // (K // BK) // H
    i_s = gl.load(span_segment + i_span)
    if i_s >= num_segments:
        return
    i_first_chunk = gl.load(span_index + i_span) * SPAN
    i_first = gl.load(cu_seqlens + i_s) + i_first_chunk * BT
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.minimum(gl.cdiv(num_rows, BT), SPAN)
    i_slot = gl.load(chunk_offsets + i_s) + i_first_chunk
    last = num_chunks - 1

    L_S: gl.constexpr = product_layout(BK, V, NW)
    L_u: gl.constexpr = product_layout(BT, BK, NW)
    s_S = gl.allocate_shared_memory(low, [SPAN, BK, V], shared_layout(BK, V, low))
    s_wide = gl.allocate_shared_memory(low, [2, BT, V], shared_layout(BT, V, low))
    s_narrow = gl.allocate_shared_memory(low, [2, BT, BK], shared_layout(BT, BK, low))
    s_u = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_w = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    # Barriers: the two places with time; against time do and q~, v; S of the first chunk, again, dS of the last one.
    arrived = gl.allocate_shared_memory(gl.int64, [7, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(7):
        mbarrier.init(arrived.index(i), count=1)
    do_arrived, v_arrived = arrived.index(2), arrived.index(3)
    S_arrived, S_arrived_again, dS_arrived = arrived.index(4), arrived.index(5), arrived.index(6)

    i_key, i_value = i_h * K + i_kb * BK, i_h * V
    i_state = (i_span * H + i_h) * K + i_kb * BK
    o_k = i_kb * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, L_S))
    fetch(s_S.index(0), states, i_state, 0, S_arrived)
    fetch(s_S.index(SPAN - 1), d_states, i_state, 0, dS_arrived)
    if last > 0:
        fetch_two(s_wide.index(0), v, i_first, i_value, s_narrow.index(0), k_decayed, i_first, i_key, arrived.index(0))
    else:
        fetch(s_wide.index(0), v, i_first, i_value, arrived.index(0))
        fetch_two(s_wide.index(1), do, i_first, i_value, s_narrow.index(1), q_decayed, i_first, i_key, do_arrived)
    i_row = i_first + BT
    if last > 1:
        fetch_two(s_wide.index(1), v, i_row, i_value, s_narrow.index(1), k_decayed, i_row, i_key, arrived.index(1))
    elif last == 1:
        fetch(s_wide.index(1), v, i_row, i_value, arrived.index(1))

    # (10), with time.
    mbarrier.wait(S_arrived, 0)
    b_S = s_S.index(0).load(L_S).to(gl.float32)
    for i in range(last):
        i_place = i & 1
        s_v, s_k, barrier = s_wide.index(i_place), s_narrow.index(i_place), arrived.index(i_place)
        b_S = gl.load(decays + ((i_slot + i).to(gl.int64) * H + i_h) * K + o_k)[:, None] * b_S
        mbarrier.wait(barrier, (i >> 1) & 1)
        b_S = warpgroup_mma(s_k.permute((1, 0)), s_v, b_S, is_async=True)
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        thread_barrier()
        i_row = i_first + (i + 2) * BT
        if i + 2 < last:
            fetch_two(s_v, v, i_row, i_value, s_k, k_decayed, i_row, i_key, barrier)
        elif i + 2 == last:
            fetch(s_v, v, i_row, i_value, barrier)
        else:
            i_row = i_first + last * BT
            fetch_two(s_v, do, i_row, i_value, s_k, q_decayed, i_row, i_key, do_arrived)
        s_S.index(i).store(b_S.to(low))

    # (11) to (14), against time.
    i_v_place = last & 1
    s_v, s_do, s_q = s_wide.index(i_v_place), s_wide.index(1 - i_v_place), s_narrow.index(1 - i_v_place)
    mbarrier.wait(dS_arrived, 0)
    b_dS = s_S.index(SPAN - 1).load(L_S).to(gl.float32)
    zero = gl.zeros([BT, BK], gl.float32, layout=L_u)
    for i_back in range(num_chunks):
        i = last - i_back
        i_row = i_first + i * BT
        left = num_rows - i * BT
        i_decay = ((i_slot + i).to(gl.int64) * H + i_h) * K + o_k
        b_decay = gl.load(decays + i_decay)
        i_dS_place = gl.where(i_back == 0, SPAN - 1, i)
        i_S_place = gl.where(i > 0, i - 1, gl.where(last > 0, SPAN - 1, 0))
        if i_back > 0:
            s_S.index(i).store(b_dS.to(low))
            mbarrier.wait(v_arrived, (i_back - 1) & 1)
        else:
            mbarrier.wait(arrived.index(i_v_place), (last >> 1) & 1)
        mbarrier.wait(do_arrived, i_back & 1)
        if i == 0:
            if last > 0:
                mbarrier.wait(S_arrived_again, 0)
        # The segment's last chunk may end inside the tiles: the next segment's rows must not reach dS.
        if left < BT:
            clear_rows(s_q, left, BT, BK, NW)
            clear_rows(s_do, left, BT, V, NW)
        tma.store_wait(pendings=0)
        publish()
        b_w = warpgroup_mma(s_v, s_S.index(i_dS_place).permute((1, 0)), zero, use_acc=False, is_async=True)
        b_u = warpgroup_mma(s_do, s_S.index(i_S_place).permute((1, 0)), zero, use_acc=False, is_async=True)
        b_product = gl.sum(s_S.index(i_S_place).load(L_S).to(gl.float32) * b_dS, 1)
        gl.store(d_decays + i_decay, b_decay * b_product)
        b_dS = b_decay[:, None] * b_dS
        b_dS = warpgroup_mma(s_q.permute((1, 0)), s_do, b_dS, is_async=True)
        b_w = warpgroup_mma_wait(2, deps=[b_w])
        thread_barrier()
        if i > 0:
            fetch(s_v, v, i_row - BT, i_value, v_arrived)
        s_w.store(b_w.to(low))
        b_u = warpgroup_mma_wait(1, deps=[b_u])
        s_u.store((scale * b_u).to(low))
        b_dS = warpgroup_mma_wait(0, deps=[b_dS])
        publish()
        if i > 0:
            fetch_two(s_do, do, i_row - BT, i_value, s_q, q_decayed, i_row - BT, i_key, do_arrived)
            if i_back == 0:
                fetch(s_S.index(SPAN - 1), states, i_state, 0, S_arrived_again)
        if left < BT:
            rows = (i_row.to(gl.int64) * H + i_h) * K + i_kb * BK
            store_rows(u + rows, s_u, left, H * K, BT, BK, NW)
            store_rows(w + rows, s_w, left, H * K, BT, BK, NW)
        else:
            store_tile(u_tiles, [i_row, i_key], s_u)
            store_tile(w_tiles, [i_row, i_key], s_w)
    tma.store_wait(pendings=0)


def state_gradients(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    local: ChunkLocal,
    chunks: Chunks,
    span_states: torch.Tensor,
    d_span_states: torch.Tensor,
) -> StateParts:
    """As the general set's."""
    v, heads, k_dim, v_dim = inputs.v, inputs.num_heads, inputs.k_dim, inputs.v_dim
    u, w, d_decays = torch.empty_like(inputs.q), torch.empty_like(inputs.k), torch.empty_like(local.decays)
    launch = state_gradients_launch(k_dim, v_dim)
    state_gradients_kernel[(chunks.num_span_slots * heads * (k_dim // launch.tile),)](
        q_decayed=tiles(local.q_decayed, launch.tile),
        k_decayed=tiles(local.k_decayed, launch.tile),
        v=tiles(v, v_dim),
        do=tiles(do, v_dim),
        decays=local.decays,
        states=tiles(span_states, v_dim, launch.tile),
        d_states=tiles(d_span_states, v_dim, launch.tile),
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_segment=chunks.spans.segment,
        span_index=chunks.spans.index,
        u=u,
        w=w,
        u_tiles=tiles(u, launch.tile),
        w_tiles=tiles(w, launch.tile),
        d_decays=d_decays,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BK=launch.tile,
        SPAN=SPAN,
        num_warps=launch.num_warps,
        num_stages=1,
    )
    return StateParts(u, w, d_decays)
