"""The gated delta rule's walks along the state, for Hopper: names and equations as in the Triton kernels' files.

Written in Gluon, Triton's lower level, because what decides here is when a copy starts and which products wait for
which: the next chunk is copied to shared memory while this one is computed, and products that do not need each other
are in flight together. Left operands are always in shared memory, as everywhere (see the forward file).

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, group slots M.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mom_layers.ops.chunk_table import CHUNK


@gluon.constexpr_function
def _copy_layout(columns, num_warps):
    """16 bytes a thread, rows of whole cache lines."""
    lanes = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def _product_layout(rows, columns, num_warps):
    """Accumulators [rows, columns]: warpgroups share the rows as far as those reach, then the columns."""
    along_rows = min(num_warps, rows // 16)
    return gl.NVMMADistributedLayout(
        [3, 0], [along_rows, num_warps // along_rows], [16, columns * along_rows // num_warps, 16]
    )


@gluon.constexpr_function
def _shared_layout(rows, columns, dtype):
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


def tiles(x, columns):
    """x [..., C] as rows that kernels fetch in tiles of a chunk's rows by ``columns``; x may have no rows."""
    rows = x if x.numel() else x.new_empty(1, *x.shape[1:])
    width = x.shape[-1] if x.dim() == 4 else x.shape[1] * x.shape[2]
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for([CHUNK, columns], dtype)
    return TensorDescriptor(rows, [rows.numel() // width, width], [width, 1], [CHUNK, columns], layout)


@gluon.jit
def _copy(shared, source, stride, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, NW: gl.constexpr):
    """Starts to copy [ROWS, COLUMNS] to shared memory; rows from `valid` on become zero."""
    layout: gl.constexpr = _copy_layout(COLUMNS, NW)
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    pointers = source + o_r[:, None] * stride + o_c[None, :]
    async_copy.async_copy_global_to_shared(shared, pointers, mask=(o_r < valid)[:, None])


@gluon.jit
def _fetch(shared, tiles, row, column, arrived):
    """Starts to copy one tile of a tensor [R, C] to shared memory. Rows past the tensor's end become zero."""
    mbarrier.expect(arrived, tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(tiles, [row, column], arrived, shared)


@gluon.jit
def _fetch_two(shared, tiles, row, column, other_shared, other_tiles, other_row, other_column, arrived):
    """The same for two tiles that arrive together."""
    mbarrier.expect(arrived, tiles.block_type.nbytes + other_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(tiles, [row, column], arrived, shared)
    tma.async_copy_global_to_shared(other_tiles, [other_row, other_column], arrived, other_shared)


@gluon.jit
def _fetch_chunk(
    s_k, k, s_q, q, s_v, v, s_X, solved, s_P, scores, row, i_key, i_value, i_chunk_row, arrived
):  # fmt: skip
    """The same for all that a chunk needs; v stands for v or do."""
    mbarrier.expect(
        arrived, 2 * k.block_type.nbytes + v.block_type.nbytes + 2 * solved.block_type.nbytes
    )
    tma.async_copy_global_to_shared(k, [row, i_key], arrived, s_k)
    tma.async_copy_global_to_shared(q, [row, i_key], arrived, s_q)
    tma.async_copy_global_to_shared(v, [row, i_value], arrived, s_v)
    tma.async_copy_global_to_shared(solved, [i_chunk_row, 0], arrived, s_X)
    tma.async_copy_global_to_shared(scores, [i_chunk_row, 0], arrived, s_P)


@gluon.jit
def _clear_rows(shared, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, NW: gl.constexpr):
    """Zeroes the rows from `valid` on of a tile [ROWS, COLUMNS]: they belong to another segment."""
    SLICE: gl.constexpr = 16
    layout: gl.constexpr = _copy_layout(COLUMNS, NW)
    o_r = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    zero = gl.zeros([SLICE, COLUMNS], shared.dtype, layout=layout)
    for i in gl.static_range(ROWS // SLICE):
        rows = shared.slice(i * SLICE, SLICE)
        rows.store(gl.where((i * SLICE + o_r < valid)[:, None], rows.load(layout), zero))


@gluon.jit
def _publish():
    """What this thread wrote to shared memory is seen by every thread's products."""
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _row_factors(
    beta, gates, rows, i_chunk, left, H: gl.constexpr, BT: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """beta, exp(G) and exp(G_last - G) of a chunk's rows [BT]; zero past the `left` rows that there are."""
    o_t = gl.arange(0, BT, layout=layout)
    b_beta = gl.load(beta + rows + o_t * H, mask=o_t < left, other=0.0).to(gl.float32)
    b_from_start = gl.load(gates + i_chunk * 2 * BT + o_t, mask=o_t < left, other=0.0)
    b_to_end = gl.load(gates + i_chunk * 2 * BT + BT + o_t, mask=o_t < left, other=0.0)
    return b_beta, b_from_start, b_to_end


@gluon.jit
def _chunk_decay(gates, i_chunk, left, BT: gl.constexpr):
    return gl.load(gates + i_chunk * 2 * BT + BT - 1, mask=left > 0, other=0.0)


@gluon.jit
def _store_state(
    pointer, s_S, K: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, SLICE: gl.constexpr, NW: gl.constexpr
):  # fmt: skip
    """Stores [K, BV] columns of a state from shared memory, in slices that need few registers."""
    layout: gl.constexpr = _copy_layout(BV, NW)
    o_k = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    o_v = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(K // SLICE):
        gl.store(pointer + i * SLICE * V + o_k[:, None] * V + o_v[None, :], s_S.slice(i * SLICE, SLICE).load(layout))


@gluon.jit
def _state_product(
    pointer, s_S, K: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, SLICE: gl.constexpr, NW: gl.constexpr
):  # fmt: skip
    """The sum over [K, BV] of a state in memory times one in shared memory."""
    layout: gl.constexpr = _copy_layout(BV, NW)
    o_k = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    o_v = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    b_sum = gl.zeros([SLICE, BV], gl.float32, layout=layout)
    for i in gl.static_range(K // SLICE):
        b_S = gl.load(pointer + i * SLICE * V + o_k[:, None] * V + o_v[None, :]).to(gl.float32)
        b_sum += b_S * s_S.slice(i * SLICE, SLICE).load(layout).to(gl.float32)
    return gl.sum(gl.sum(b_sum, 1), 0)


@gluon.jit
def recurrence_kernel(
    q,
    k,
    v,
    beta,
    gates,
    solved,
    scores,
    cu_seqlens,
    chunk_offsets,
    group_offsets,
    initial_state,
    o,
    o_tiles,
    final_state,
    decayed_state,
    checkpoints,
    errors,
    error_tiles,
    scale,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr,
    STORE_FINAL_STATE: gl.constexpr,
    FOR_BACKWARD: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BV columns of the state along one segment and head. For the backward pass also e, and every GROUP-th state."""
    low: gl.constexpr = k.dtype
    NW: gl.constexpr = num_warps
    i_v = gl.program_id(0) % (V // BV)
    i_h = gl.program_id(0) // (V // BV) % H
    i_s = (gl.num_programs(0) - 1 - gl.program_id(0)) // (V // BV) // H
    i_first = gl.load(cu_seqlens + i_s)
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.cdiv(num_rows, BT)
    i_chunk = gl.load(chunk_offsets + i_s) * H + i_h
    i_group = gl.load(group_offsets + i_s)
    rows = i_first.to(gl.int64) * H + i_h

    L_r: gl.constexpr = _product_layout(BT, BV, NW)
    L_S: gl.constexpr = _product_layout(K, BV, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_r)
    AHEAD: gl.constexpr = STAGES > 1
    SLICE: gl.constexpr = gl.constexpr(min(K, 32))
    s_k = gl.allocate_shared_memory(low, [2, BT, K], _shared_layout(BT, K, low))
    s_q_all = gl.allocate_shared_memory(low, [STAGES, BT, K], _shared_layout(BT, K, low))
    s_X_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], _shared_layout(BT, BT, low))
    s_P_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], _shared_layout(BT, BT, low))
    s_S_one = gl.allocate_shared_memory(low, [1, K, BV], _shared_layout(K, BV, low))
    # Two places that swap after every chunk: one is for v (unless it comes a chunk ahead), -beta r and e in turn, the
    # other for what goes to the state and then for the next v. o follows u.
    s_turns = gl.allocate_shared_memory(low, [2, BT, BV], _shared_layout(BT, BV, low))
    if AHEAD:
        s_v_all = gl.allocate_shared_memory(low, [2, BT, BV], _shared_layout(BT, BV, low))
    else:
        s_v_all = s_turns
    s_u_one = gl.allocate_shared_memory(low, [1, BT, BV], _shared_layout(BT, BV, low))

    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, L_S))
    o_kv = o_k[:, None] * V + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_S)))[None, :]
    i_state = (i_s.to(gl.int64) * H + i_h) * K * V

    if HAS_INITIAL_STATE:
        b_S = gl.load(initial_state + i_state + o_kv)
    else:
        b_S = gl.zeros([K, BV], gl.float32, layout=L_S)
    arrived = gl.allocate_shared_memory(gl.int64, [4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(4):
        mbarrier.init(arrived.index(i), count=1)
    qX_arrived, vP_arrived = arrived.index(2), arrived.index(3)
    i_key, i_value = i_h * K, i_h * V + i_v * BV
    if num_chunks > 0:
        if AHEAD:
            _fetch_chunk(
                s_k.index(0), k, s_q_all.index(0), q, s_v_all.index(0), v, s_X_all.index(0), solved,
                s_P_all.index(0), scores, i_first, i_key, i_value, i_chunk * BT, arrived.index(0),
            )  # fmt: skip
        else:
            _fetch(s_k.index(0), k, i_first, i_key, arrived.index(0))
            _fetch_two(s_q_all.index(0), q, i_first, i_key, s_X_all.index(0), solved, i_chunk * BT, 0, qX_arrived)
            _fetch_two(s_v_all.index(0), v, i_first, i_value, s_P_all.index(0), scores, i_chunk * BT, 0, vP_arrived)
    if AHEAD:
        b_beta, b_from_start, b_to_end = _row_factors(beta, gates, rows, i_chunk.to(gl.int64), num_rows, H, BT, L_t)
        chunk_decay = _chunk_decay(gates, i_chunk.to(gl.int64), num_rows, BT)
    for i_t in range(num_chunks):
        left = num_rows - i_t * BT
        i_buffer = i_t & 1
        m_t = gl.arange(0, BT, layout=L_t) < left
        i_zero = (rows >> 62).to(gl.int32)
        i_stage = i_buffer if AHEAD else i_zero
        s_q, s_X, s_P = s_q_all.index(i_stage), s_X_all.index(i_stage), s_P_all.index(i_stage)
        s_S = s_S_one.index(i_zero)
        s_u = s_u_one.index(i_zero)
        s_r, s_end = s_turns.index(i_buffer), s_turns.index(1 - i_buffer)
        s_S.store(b_S.to(low))
        mbarrier.wait(arrived.index(i_buffer), (i_t >> 1) & 1)
        if left < BT:
            _clear_rows(s_k.index(i_buffer), left, BT, K, NW)
        _publish()
        if left > BT:
            if AHEAD:
                _fetch_chunk(
                    s_k.index(1 - i_buffer), k, s_q_all.index(1 - i_buffer), q, s_v_all.index(1 - i_buffer), v,
                    s_X_all.index(1 - i_buffer), solved, s_P_all.index(1 - i_buffer), scores,
                    i_first + BT, i_key, i_value, (i_chunk + H) * BT, arrived.index(1 - i_buffer),
                )  # fmt: skip
            else:
                _fetch(s_k.index(1 - i_buffer), k, i_first + BT, i_key, arrived.index(1 - i_buffer))
        if i_t > 0:
            tma.async_copy_shared_to_global(o_tiles, [i_first - BT, i_value], s_u)
            if FOR_BACKWARD:
                tma.async_copy_shared_to_global(error_tiles, [i_first - BT, i_value], s_end)
        if FOR_BACKWARD:
            if i_t % GROUP == 0:
                i_point = (i_group + i_t // GROUP).to(gl.int64) * H + i_h
                _store_state(checkpoints + i_point * K * V + i_v * BV, s_S, K, V, BV, SLICE, NW)
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_kS = warpgroup_mma(s_k.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        if not AHEAD:
            mbarrier.wait(qX_arrived, i_buffer)
        b_qS = warpgroup_mma(s_q, s_S, zero, use_acc=False, is_async=True)
        if AHEAD:
            next_beta, next_from_start, next_to_end = _row_factors(
                beta, gates, rows + BT * H, (i_chunk + H).to(gl.int64), left - BT, H, BT, L_t
            )
            next_decay = _chunk_decay(gates, (i_chunk + H).to(gl.int64), left - BT, BT)
        else:
            b_beta, b_from_start, b_to_end = _row_factors(beta, gates, rows, i_chunk.to(gl.int64), left, H, BT, L_t)
            chunk_decay = _chunk_decay(gates, i_chunk.to(gl.int64), left, BT)
        if not AHEAD:
            mbarrier.wait(vP_arrived, i_buffer)
        b_v = gl.where(m_t[:, None], s_v_all.index(i_buffer).load(L_r).to(gl.float32), 0.0)
        b_kS = warpgroup_mma_wait(1, deps=[b_kS])
        b_r = b_v - b_from_start[:, None] * b_kS
        s_r.store((-b_beta[:, None] * b_r).to(low))
        tma.store_wait(pendings=0)
        _publish()
        b_e = warpgroup_mma(s_X, s_r, b_r, is_async=True)
        b_e, b_qS = warpgroup_mma_wait(0, deps=[b_e, b_qS])
        b_u = b_beta[:, None] * b_e
        s_end.store((b_to_end[:, None] * b_u).to(low))
        s_u.store(b_u.to(low))
        b_S = chunk_decay * b_S
        if FOR_BACKWARD and STORE_FINAL_STATE:
            if left <= BT:
                gl.store(decayed_state + i_state + o_kv, b_S.to(low))
        _publish()
        b_S_next = warpgroup_mma(s_k.index(i_buffer).permute((1, 0)), s_end, b_S, is_async=True)
        b_o = warpgroup_mma(s_P, s_u, b_from_start[:, None] * b_qS, is_async=True)
        if not AHEAD:
            if left > BT:
                _fetch_two(s_q, q, i_first + BT, i_key, s_X, solved, (i_chunk + H) * BT, 0, qX_arrived)
        if FOR_BACKWARD:
            s_r.store(b_e.to(low))
        b_S, b_o = warpgroup_mma_wait(0, deps=[b_S_next, b_o])
        gl.thread_barrier()
        if not AHEAD:
            if left > BT:
                _fetch_two(s_end, v, i_first + BT, i_value, s_P, scores, (i_chunk + H) * BT, 0, vP_arrived)
        s_u.store((scale * b_o).to(low))
        if AHEAD:
            chunk_decay = next_decay
            b_beta, b_from_start, b_to_end = next_beta, next_from_start, next_to_end
        rows += BT * H
        i_first += BT
        i_chunk += H
    if num_chunks > 0:
        gl.thread_barrier()
        L_io: gl.constexpr = _copy_layout(BV, NW)
        o_t = gl.arange(0, BT, layout=gl.SliceLayout(1, L_io))
        o_tv = o_t[:, None] * (H * V) + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_io)))[None, :]
        # Loaded again: of what the loop has counted the compiler would keep an address for every store.
        end = gl.load(cu_seqlens + i_s + 1)
        start = end - 1 - (num_rows - 1) % BT
        m_tv = (o_t < end - start)[:, None]
        o_tv += (start.to(gl.int64) * H + i_h) * V
        gl.store(o + o_tv, s_u_one.index(0).load(L_io), mask=m_tv)
        if FOR_BACKWARD:
            gl.store(errors + o_tv, s_turns.index(1 - num_chunks & 1).load(L_io), mask=m_tv)
    if STORE_FINAL_STATE:
        gl.store(final_state + i_state + o_kv, b_S)


@gluon.jit
def reverse_recurrence_kernel(
    q,
    k,
    beta,
    gates,
    solved,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    group_offsets,
    checkpoints,
    decayed_state,
    d_final_state,
    d_initial_state,
    d_checkpoints,
    d_errors,
    boundary,
    scale,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    HAS_D_FINAL_STATE: gl.constexpr,
    STORE_D_INITIAL_STATE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BV columns of dS along one segment and head, from its last chunk to its first. Stores y, and where a group of
    chunks ends dS and these columns' part of <S, dS>."""
    low: gl.constexpr = k.dtype
    NW: gl.constexpr = num_warps
    i_v = gl.program_id(0) % (V // BV)
    i_h = gl.program_id(0) // (V // BV) % H
    i_s = (gl.num_programs(0) - 1 - gl.program_id(0)) // (V // BV) // H
    i_first = gl.load(cu_seqlens + i_s)
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.cdiv(num_rows, BT)
    i_group = gl.load(group_offsets + i_s)
    i_chunk = (gl.load(chunk_offsets + i_s) + num_chunks - 1) * H + i_h
    i_row = i_first + (num_chunks - 1) * BT
    rows = i_row.to(gl.int64) * H + i_h

    L_r: gl.constexpr = _product_layout(BT, BV, NW)
    L_S: gl.constexpr = _product_layout(K, BV, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_r)
    AHEAD: gl.constexpr = STAGES > 1
    SLICE: gl.constexpr = gl.constexpr(min(K, 32))
    s_k = gl.allocate_shared_memory(low, [2, BT, K], _shared_layout(BT, K, low))
    s_q_all = gl.allocate_shared_memory(low, [STAGES, BT, K], _shared_layout(BT, K, low))
    s_X_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], _shared_layout(BT, BT, low))
    s_P_all = gl.allocate_shared_memory(low, [STAGES, BT, BT], _shared_layout(BT, BT, low))
    s_S_one = gl.allocate_shared_memory(low, [1, K, BV], _shared_layout(K, BV, low))
    # Two places that swap after every chunk: one is for do (unless it comes a chunk ahead) and then for what y takes
    # from the state, the other for what do adds to the state and then for the next do.
    s_turns = gl.allocate_shared_memory(low, [2, BT, BV], _shared_layout(BT, BV, low))
    if AHEAD:
        s_do_all = gl.allocate_shared_memory(low, [2, BT, BV], _shared_layout(BT, BV, low))
    else:
        s_do_all = s_turns
    s_z = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))  # then y

    L_io: gl.constexpr = _copy_layout(BV, NW)
    L_row: gl.constexpr = gl.SliceLayout(1, L_io)
    o_t = gl.arange(0, BT, layout=L_row)
    o_tv = o_t[:, None] * (H * V) + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_io)))[None, :]
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, L_S))
    o_kv = o_k[:, None] * V + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_S)))[None, :]
    i_state = (i_s.to(gl.int64) * H + i_h) * K * V

    if HAS_D_FINAL_STATE:
        b_dS = gl.load(d_final_state + i_state + o_kv)
        b_decayed = gl.load(decayed_state + i_state + o_kv, mask=(o_kv >= 0) & (num_rows > 0), other=0.0)
        product = gl.sum(gl.sum(b_decayed.to(gl.float32) * b_dS, 1), 0)
    else:
        b_dS = gl.zeros([K, BV], gl.float32, layout=L_S)
        product = gl.to_tensor(0.0)
    arrived = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(5):
        mbarrier.init(arrived.index(i), count=1)
    P_arrived, X_arrived, ends_arrived = arrived.index(2), arrived.index(3), arrived.index(4)
    left = gl.where(num_chunks > 0, num_rows - (num_chunks - 1) * BT, 0)
    i_key, i_value = i_h * K, i_h * V + i_v * BV
    if num_chunks > 0:
        if AHEAD:
            _fetch_chunk(
                s_k.index(0), k, s_q_all.index(0), q, s_do_all.index(0), do, s_X_all.index(0), solved,
                s_P_all.index(0), scores, i_row, i_key, i_value, i_chunk * BT, arrived.index(0),
            )  # fmt: skip
        else:
            _fetch(s_k.index(0), k, i_row, i_key, arrived.index(0))
            _fetch_two(s_q_all.index(0), q, i_row, i_key, s_do_all.index(0), do, i_row, i_value, ends_arrived)
            _fetch(s_P_all.index(0), scores, i_chunk * BT, 0, P_arrived)
            _fetch(s_X_all.index(0), solved, i_chunk * BT, 0, X_arrived)
        gl.store(boundary + ((i_group + (num_chunks - 1) // GROUP).to(gl.int64) * H + i_h) * (V // BV) + i_v, product)
        if left < BT:
            mbarrier.wait(arrived.index(0), 0)
            if not AHEAD:
                mbarrier.wait(ends_arrived, 0)
            _clear_rows(s_k.index(0), left, BT, K, NW)
            _clear_rows(s_q_all.index(0), left, BT, K, NW)
            _clear_rows(s_do_all.index(0), left, BT, BV, NW)
            gl.thread_barrier()
    b_beta, b_from_start, b_to_end = _row_factors(beta, gates, rows, i_chunk.to(gl.int64), left, H, BT, L_t)
    chunk_decay = _chunk_decay(gates, i_chunk.to(gl.int64), left, BT)
    for i_back in range(num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = o_t < num_rows - i_t * BT
        i_buffer = i_back & 1
        s_do, s_y, s_start = s_do_all.index(i_buffer), s_turns.index(i_buffer), s_turns.index(1 - i_buffer)
        i_zero = (rows >> 62).to(gl.int32)
        i_stage = i_buffer if AHEAD else i_zero
        s_q, s_X, s_P = s_q_all.index(i_stage), s_X_all.index(i_stage), s_P_all.index(i_stage)
        s_S = s_S_one.index(i_zero)
        s_S.store(b_dS.to(low))
        if AHEAD:
            mbarrier.wait(arrived.index(i_buffer), (i_back >> 1) & 1)
        else:
            mbarrier.wait(ends_arrived, i_buffer)
        b_do = s_do.load(L_r).to(gl.float32)
        s_start.store(((scale * b_from_start)[:, None] * b_do).to(low))
        if not AHEAD:
            mbarrier.wait(arrived.index(i_buffer), (i_back >> 1) & 1)
            mbarrier.wait(P_arrived, i_buffer)
        _publish()
        if i_t > 0:
            if AHEAD:
                _fetch_chunk(
                    s_k.index(1 - i_buffer), k, s_q_all.index(1 - i_buffer), q, s_do_all.index(1 - i_buffer), do,
                    s_X_all.index(1 - i_buffer), solved, s_P_all.index(1 - i_buffer), scores,
                    i_row - BT, i_key, i_value, (i_chunk - H) * BT, arrived.index(1 - i_buffer),
                )  # fmt: skip
            else:
                _fetch(s_k.index(1 - i_buffer), k, i_row - BT, i_key, arrived.index(1 - i_buffer))
        if (i_t % GROUP == GROUP - 1) | (i_back == 0):
            i_point = (i_group + i_t // GROUP).to(gl.int64) * H + i_h
            _store_state(d_checkpoints + i_point * K * V + i_v * BV, s_S, K, V, BV, SLICE, NW)
            if i_back > 0:
                after = checkpoints + (i_point + H) * K * V + i_v * BV
                gl.store(boundary + i_point * (V // BV) + i_v, _state_product(after, s_S, K, V, BV, SLICE, NW))
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_kdS = warpgroup_mma(s_k.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        b_Pdo = warpgroup_mma(s_P.permute((1, 0)), s_do, zero, use_acc=False, is_async=True)
        next_beta, next_from_start, next_to_end = _row_factors(
            beta, gates, rows - BT * H, (i_chunk - H).to(gl.int64), gl.where(i_t > 0, BT, 0), H, BT, L_t
        )
        next_decay = _chunk_decay(gates, (i_chunk - H).to(gl.int64), i_t, BT)
        b_kdS, b_Pdo = warpgroup_mma_wait(0, deps=[b_kdS, b_Pdo])
        b_z = scale * b_Pdo + b_to_end[:, None] * b_kdS
        s_z.store((-b_beta[:, None] * b_z).to(low))
        b_dS = chunk_decay * b_dS
        if not AHEAD:
            mbarrier.wait(X_arrived, i_buffer)
        _publish()
        if not AHEAD:
            if i_t > 0:
                _fetch(s_P, scores, (i_chunk - H) * BT, 0, P_arrived)
        b_y = warpgroup_mma(s_X.permute((1, 0)), s_z, b_z, is_async=True)
        b_dS_next = warpgroup_mma(s_q.permute((1, 0)), s_start, b_dS, is_async=True)
        b_y = warpgroup_mma_wait(1, deps=[b_y])
        s_y.store(((-b_from_start * b_beta)[:, None] * b_y).to(low))
        _publish()
        if not AHEAD:
            if i_t > 0:
                _fetch(s_X, solved, (i_chunk - H) * BT, 0, X_arrived)
        b_dS_next = warpgroup_mma(s_k.index(i_buffer).permute((1, 0)), s_y, b_dS_next, is_async=True)
        s_z.store(b_y.to(low))
        b_dS = warpgroup_mma_wait(0, deps=[b_dS_next])
        gl.thread_barrier()
        if not AHEAD:
            if i_t > 0:
                _fetch_two(s_q, q, i_row - BT, i_key, s_start, do, i_row - BT, i_value, ends_arrived)
        gl.store(d_errors + rows * V + o_tv, s_z.load(L_io), mask=m_t[:, None])
        chunk_decay = next_decay
        b_beta, b_from_start, b_to_end = next_beta, next_from_start, next_to_end
        rows -= BT * H
        i_row -= BT
        i_chunk -= H
    if STORE_D_INITIAL_STATE:
        gl.store(d_initial_state + i_state + o_kv, b_dS)
