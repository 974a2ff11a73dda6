"""The gated delta rule's walks along the state, for Hopper: names and equations as in the Triton kernels' files.

Written in Gluon, Triton's lower level, because what decides here is when a copy starts and which products wait for
which: the next chunk is copied to shared memory while this one is computed, and products that do not need each other
are in flight together. Left operands are always in shared memory, as everywhere (see the forward file).

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, group slots M.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait


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


@gluon.jit
def _copy(shared, source, stride, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, NW: gl.constexpr):
    """Starts to copy [ROWS, COLUMNS] to shared memory; rows from `valid` on become zero."""
    layout: gl.constexpr = _copy_layout(COLUMNS, NW)
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    pointers = source + o_r[:, None] * stride + o_c[None, :]
    async_copy.async_copy_global_to_shared(shared, pointers, mask=(o_r < valid)[:, None])


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
    final_state,
    decayed_state,
    checkpoints,
    errors,
    scale,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BV: gl.constexpr,
    GROUP: gl.constexpr,
    HAS_INITIAL_STATE: gl.constexpr,
    STORE_FINAL_STATE: gl.constexpr,
    FOR_BACKWARD: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BV columns of the state along one segment and head. For the backward pass also e, and every GROUP-th state."""
    low: gl.constexpr = k.dtype.element_ty
    NW: gl.constexpr = num_warps
    i_v = gl.program_id(0) % (V // BV)
    i_h = gl.program_id(0) // (V // BV) % H
    i_s = (gl.num_programs(0) - 1 - gl.program_id(0)) // (V // BV) // H
    i_first = gl.load(cu_seqlens + i_s)
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.cdiv(num_rows, BT)
    i_chunk = gl.load(chunk_offsets + i_s).to(gl.int64) * H + i_h
    i_group = gl.load(group_offsets + i_s)
    rows = i_first.to(gl.int64) * H + i_h

    L_r: gl.constexpr = _product_layout(BT, BV, NW)
    L_S: gl.constexpr = _product_layout(K, BV, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_r)
    s_k = gl.allocate_shared_memory(low, [2, BT, K], _shared_layout(BT, K, low))
    s_q = gl.allocate_shared_memory(low, [2, BT, K], _shared_layout(BT, K, low))
    s_X = gl.allocate_shared_memory(low, [2, BT, BT], _shared_layout(BT, BT, low))
    s_P = gl.allocate_shared_memory(low, [2, BT, BT], _shared_layout(BT, BT, low))
    s_S = gl.allocate_shared_memory(low, [K, BV], _shared_layout(K, BV, low))
    s_r = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))
    s_u = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))
    s_end = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))
    s_e = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))

    # v, e and o pass through shared memory, so that whole cache lines are read and written.
    L_io: gl.constexpr = _copy_layout(BV, NW)
    o_t = gl.arange(0, BT, layout=gl.SliceLayout(1, L_io))
    o_tv = o_t[:, None] * (H * V) + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_io)))[None, :]
    o_k = gl.arange(0, K, layout=gl.SliceLayout(1, L_S))
    o_kv = o_k[:, None] * V + (i_v * BV + gl.arange(0, BV, layout=gl.SliceLayout(0, L_S)))[None, :]
    i_state = (i_s.to(gl.int64) * H + i_h) * K * V

    if HAS_INITIAL_STATE:
        b_S = gl.load(initial_state + i_state + o_kv)
    else:
        b_S = gl.zeros([K, BV], gl.float32, layout=L_S)
    if num_chunks > 0:
        _copy(s_k.index(0), k + rows * K, H * K, num_rows, BT, K, NW)
        _copy(s_X.index(0), solved + i_chunk * BT * BT, BT, BT, BT, BT, NW)
        _copy(s_q.index(0), q + rows * K, H * K, num_rows, BT, K, NW)
        _copy(s_P.index(0), scores + i_chunk * BT * BT, BT, BT, BT, BT, NW)
    async_copy.commit_group()
    s_r.store(gl.load(v + rows * V + o_tv, mask=(o_t < num_rows)[:, None], other=0.0))
    b_beta, b_from_start, b_to_end = _row_factors(beta, gates, rows, i_chunk, num_rows, H, BT, L_t)
    chunk_decay = _chunk_decay(gates, i_chunk, num_rows, BT)
    for i_t in range(num_chunks):
        left = num_rows - i_t * BT
        i_buffer = i_t & 1
        b_S_low = b_S.to(low)
        s_S.store(b_S_low)
        async_copy.wait_group(0)
        _publish()
        if left > BT:
            _copy(s_k.index(1 - i_buffer), k + (rows + BT * H) * K, H * K, left - BT, BT, K, NW)
            _copy(s_X.index(1 - i_buffer), solved + (i_chunk + H) * BT * BT, BT, BT, BT, BT, NW)
            _copy(s_q.index(1 - i_buffer), q + (rows + BT * H) * K, H * K, left - BT, BT, K, NW)
            _copy(s_P.index(1 - i_buffer), scores + (i_chunk + H) * BT * BT, BT, BT, BT, BT, NW)
        async_copy.commit_group()
        if i_t > 0:
            gl.store(o + (rows - BT * H) * V + o_tv, s_u.load(L_io))
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_kS = warpgroup_mma(s_k.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        b_qS = warpgroup_mma(s_q.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        b_next_v = gl.load(v + (rows + BT * H) * V + o_tv, mask=(o_t < left - BT)[:, None], other=0.0)
        next_beta, next_from_start, next_to_end = _row_factors(
            beta, gates, rows + BT * H, i_chunk + H, left - BT, H, BT, L_t
        )
        next_decay = _chunk_decay(gates, i_chunk + H, left - BT, BT)
        if FOR_BACKWARD:
            if i_t % GROUP == 0:
                i_point = (i_group + i_t // GROUP).to(gl.int64) * H + i_h
                gl.store(checkpoints + i_point * K * V + o_kv, b_S_low)
        b_v = s_r.load(L_r)
        b_kS = warpgroup_mma_wait(1, deps=[b_kS])
        b_r = b_v.to(gl.float32) - b_from_start[:, None] * b_kS
        s_r.store((b_beta[:, None] * b_r).to(low))
        _publish()
        b_Xr = warpgroup_mma(s_X.index(i_buffer), s_r, zero, use_acc=False, is_async=True)
        b_Xr, b_qS = warpgroup_mma_wait(0, deps=[b_Xr, b_qS])
        b_e = b_r - b_Xr
        b_u = b_beta[:, None] * b_e
        s_end.store((b_to_end[:, None] * b_u).to(low))
        s_u.store(b_u.to(low))
        if FOR_BACKWARD:
            s_e.store(b_e.to(low))
        b_S = chunk_decay * b_S
        if FOR_BACKWARD and STORE_FINAL_STATE:
            if left <= BT:
                gl.store(decayed_state + i_state + o_kv, b_S.to(low))
        _publish()
        b_S_next = warpgroup_mma(s_k.index(i_buffer).permute((1, 0)), s_end, b_S, is_async=True)
        b_o = warpgroup_mma(s_P.index(i_buffer), s_u, b_from_start[:, None] * b_qS, is_async=True)
        s_r.store(b_next_v)
        if FOR_BACKWARD:
            gl.store(errors + rows * V + o_tv, s_e.load(L_io), mask=(o_t < left)[:, None])
        b_S, b_o = warpgroup_mma_wait(0, deps=[b_S_next, b_o])
        gl.thread_barrier()
        s_u.store((scale * b_o).to(low))
        chunk_decay = next_decay
        b_beta, b_from_start, b_to_end = next_beta, next_from_start, next_to_end
        rows += BT * H
        i_chunk += H
    if num_chunks > 0:
        gl.thread_barrier()
        m_t = o_t < num_rows - (num_chunks - 1) * BT
        gl.store(o + (rows - BT * H) * V + o_tv, s_u.load(L_io), mask=m_t[:, None])
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
    HAS_D_FINAL_STATE: gl.constexpr,
    STORE_D_INITIAL_STATE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BV columns of dS along one segment and head, from its last chunk to its first. Stores y, and where a group of
    chunks ends dS and these columns' part of <S, dS>."""
    low: gl.constexpr = k.dtype.element_ty
    NW: gl.constexpr = num_warps
    i_v = gl.program_id(0) % (V // BV)
    i_h = gl.program_id(0) // (V // BV) % H
    i_s = (gl.num_programs(0) - 1 - gl.program_id(0)) // (V // BV) // H
    i_first = gl.load(cu_seqlens + i_s)
    num_rows = gl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = gl.cdiv(num_rows, BT)
    i_group = gl.load(group_offsets + i_s)
    i_chunk = (gl.load(chunk_offsets + i_s) + num_chunks - 1).to(gl.int64) * H + i_h
    rows = (i_first + (num_chunks - 1) * BT).to(gl.int64) * H + i_h

    L_r: gl.constexpr = _product_layout(BT, BV, NW)
    L_S: gl.constexpr = _product_layout(K, BV, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_r)
    s_k = gl.allocate_shared_memory(low, [2, BT, K], _shared_layout(BT, K, low))
    s_q = gl.allocate_shared_memory(low, [2, BT, K], _shared_layout(BT, K, low))
    s_X = gl.allocate_shared_memory(low, [2, BT, BT], _shared_layout(BT, BT, low))
    s_P = gl.allocate_shared_memory(low, [2, BT, BT], _shared_layout(BT, BT, low))
    s_S = gl.allocate_shared_memory(low, [K, BV], _shared_layout(K, BV, low))
    s_do = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))
    s_start = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))
    s_z = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))
    s_y = gl.allocate_shared_memory(low, [BT, BV], _shared_layout(BT, BV, low))

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
    left = gl.where(num_chunks > 0, num_rows - (num_chunks - 1) * BT, 0)
    if num_chunks > 0:
        _copy(s_k.index(0), k + rows * K, H * K, left, BT, K, NW)
        _copy(s_P.index(0), scores + i_chunk * BT * BT, BT, BT, BT, BT, NW)
        _copy(s_X.index(0), solved + i_chunk * BT * BT, BT, BT, BT, BT, NW)
        _copy(s_q.index(0), q + rows * K, H * K, left, BT, K, NW)
        gl.store(boundary + ((i_group + (num_chunks - 1) // GROUP).to(gl.int64) * H + i_h) * (V // BV) + i_v, product)
    async_copy.commit_group()
    b_do = gl.load(do + rows * V + o_tv, mask=(o_t < left)[:, None], other=0.0)
    b_beta, b_from_start, b_to_end = _row_factors(beta, gates, rows, i_chunk, left, H, BT, L_t)
    b_start = scale * gl.load(gates + i_chunk * 2 * BT + o_t, mask=o_t < left, other=0.0)
    chunk_decay = _chunk_decay(gates, i_chunk, left, BT)
    for i_back in range(num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = o_t < num_rows - i_t * BT
        i_buffer = i_back & 1
        b_dS_low = b_dS.to(low)
        s_S.store(b_dS_low)
        s_do.store(b_do)
        s_start.store((b_start[:, None] * b_do.to(gl.float32)).to(low))
        async_copy.wait_group(0)
        _publish()
        if i_t > 0:
            _copy(s_k.index(1 - i_buffer), k + (rows - BT * H) * K, H * K, BT, BT, K, NW)
            _copy(s_P.index(1 - i_buffer), scores + (i_chunk - H) * BT * BT, BT, BT, BT, BT, NW)
            _copy(s_X.index(1 - i_buffer), solved + (i_chunk - H) * BT * BT, BT, BT, BT, BT, NW)
            _copy(s_q.index(1 - i_buffer), q + (rows - BT * H) * K, H * K, BT, BT, K, NW)
        async_copy.commit_group()
        zero = gl.zeros([BT, BV], gl.float32, layout=L_r)
        b_kdS = warpgroup_mma(s_k.index(i_buffer), s_S, zero, use_acc=False, is_async=True)
        b_Pdo = warpgroup_mma(s_P.index(i_buffer).permute((1, 0)), s_do, zero, use_acc=False, is_async=True)
        b_next_do = gl.load(do + (rows - BT * H) * V + o_tv, mask=(o_tv >= 0) & (i_t > 0), other=0.0)
        next_beta, next_from_start, next_to_end = _row_factors(
            beta, gates, rows - BT * H, i_chunk - H, gl.where(i_t > 0, BT, 0), H, BT, L_t
        )
        m_next = (o_t >= 0) & (i_t > 0)
        b_next_start = scale * gl.load(gates + (i_chunk - H) * 2 * BT + o_t, mask=m_next, other=0.0)
        next_decay = _chunk_decay(gates, i_chunk - H, i_t, BT)
        if (i_t % GROUP == GROUP - 1) | (i_back == 0):
            i_point = (i_group + i_t // GROUP).to(gl.int64) * H + i_h
            gl.store(d_checkpoints + i_point * K * V + o_kv, b_dS_low)
            if i_back > 0:
                b_S = gl.load(checkpoints + (i_point + H) * K * V + o_kv).to(gl.float32)
                gl.store(boundary + i_point * (V // BV) + i_v, gl.sum(gl.sum(b_S * b_dS, 1), 0))
        b_kdS, b_Pdo = warpgroup_mma_wait(0, deps=[b_kdS, b_Pdo])
        b_z = scale * b_Pdo + b_to_end[:, None] * b_kdS
        s_z.store((b_beta[:, None] * b_z).to(low))
        b_dS = chunk_decay * b_dS
        _publish()
        b_Xz = warpgroup_mma(s_X.index(i_buffer).permute((1, 0)), s_z, zero, use_acc=False, is_async=True)
        b_dS_next = warpgroup_mma(s_q.index(i_buffer).permute((1, 0)), s_start, b_dS, is_async=True)
        b_Xz = warpgroup_mma_wait(1, deps=[b_Xz])
        b_y = b_z - b_Xz
        s_y.store(((-b_from_start * b_beta)[:, None] * b_y).to(low))
        s_do.store(b_y.to(low))
        _publish()
        b_dS_next = warpgroup_mma(s_k.index(i_buffer).permute((1, 0)), s_y, b_dS_next, is_async=True)
        gl.store(d_errors + rows * V + o_tv, s_do.load(L_io), mask=m_t[:, None])
        b_dS = warpgroup_mma_wait(0, deps=[b_dS_next])
        b_do, b_start, chunk_decay = b_next_do, b_next_start, next_decay
        b_beta, b_from_start, b_to_end = next_beta, next_from_start, next_to_end
        rows -= BT * H
        i_chunk -= H
    if STORE_D_INITIAL_STATE:
        gl.store(d_initial_state + i_state + o_kv, b_dS)
