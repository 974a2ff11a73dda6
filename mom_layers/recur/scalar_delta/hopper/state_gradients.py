"""The gradients that come through the states, for Hopper. Names and equations as in `triton.state_gradients`.

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
    tiles,
)
from mom_layers.recur.scalar_delta.hopper.launches import state_gradients_launch
from mom_layers.recur.scalar_delta.hopper.tiles import decay_of_chunk, row_factors
from mom_layers.recur.scalar_delta.tensors import ErrorRows, Inputs, StateGradients


@gluon.jit
def _scaled_factors(
    beta, decays, rows, i_chunk, left, scale, H: gl.constexpr, BT: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """The row factors of q in (12), of k in (13) and of k in (14); in (8) and (11) they go onto the states' updates."""
    b_beta, b_from_start, b_to_end = row_factors(beta, decays, rows, i_chunk, left, H, BT, layout)
    return scale * b_from_start, -b_from_start * b_beta, b_to_end * b_beta


@gluon.jit(do_not_specialize=["num_segments"])
def state_gradients_kernel(
    q,
    k,
    beta,
    decays,
    errors,
    d_errors,
    do,
    states,
    cu_seqlens,
    chunk_offsets,
    span_segment,
    span_index,
    dq,
    dk,
    dq_tiles,
    dk_tiles,
    row_terms,
    totals,
    scale,
    num_segments,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BK: gl.constexpr,
    SPAN: gl.constexpr,
    REVERSE: gl.constexpr,
    num_warps: gl.constexpr,
):
    """BK rows of S along one span and head for (12) and (13), or of dS against time for (14), where REVERSE.

    Each of a chunk's five tiles has a place in shared memory, and the next chunk's tile is copied there as soon as the
    last product that reads the place is done. In (8) and (11) the row factors go onto q and k, which are narrower here
    than e, y and do.
    """
    low: gl.constexpr = k.dtype
    NW: gl.constexpr = num_warps
    # Tile, head, span and its segment; then the span's first chunk, or its last one against time.
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
    i_chunk = (gl.load(chunk_offsets + i_s) + i_first_chunk).to(gl.int64) * H + i_h
    if REVERSE:
        i_chunk += (num_chunks - 1).to(gl.int64) * H
        i_first += (num_chunks - 1) * BT
        num_rows -= (num_chunks - 1) * BT
    step: gl.constexpr = -1 if REVERSE else 1

    # Accumulators: the state, and rows by columns of K. One place in shared memory for each tile, and one for dk.
    L_S: gl.constexpr = product_layout(BK, V, NW)
    L_d: gl.constexpr = product_layout(BT, BK, NW)
    L_t: gl.constexpr = gl.SliceLayout(1, L_d)
    s_all_S = gl.allocate_shared_memory(low, [1, BK, V], shared_layout(BK, V, low))
    s_all = gl.allocate_shared_memory(low, [3, BT, V], shared_layout(BT, V, low))
    s_e, s_y, s_do = s_all.index(0), s_all.index(1), s_all.index(2)
    s_k = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_q = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_out = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))

    rows = i_first.to(gl.int64) * H + i_h
    i_key, i_value = i_h * K + i_kb * BK, i_h * V
    arrived = gl.allocate_shared_memory(gl.int64, [5, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(5):
        mbarrier.init(arrived.index(i), count=1)
    e_arrived, do_y_arrived = arrived.index(0), arrived.index(1)
    k_arrived, q_arrived, dk_arrived = arrived.index(2), arrived.index(3), arrived.index(4)
    # The first chunk's tiles, in the order of their use. Against time this chunk may be the segment's last: the next
    # segment's rows are cleared before they could reach dS.
    if REVERSE:
        fetch(s_e, errors, i_first, i_value, e_arrived)
        fetch_two(s_q, q, i_first, i_key, s_k, k, i_first, i_key, k_arrived)
        fetch_two(s_do, do, i_first, i_value, s_y, d_errors, i_first, i_value, do_y_arrived)
        if num_rows < BT:
            mbarrier.wait(k_arrived, 0)
            mbarrier.wait(do_y_arrived, 0)
            clear_rows(s_q, num_rows, BT, BK, NW)
            clear_rows(s_k, num_rows, BT, BK, NW)
            clear_rows(s_do, num_rows, BT, V, NW)
            clear_rows(s_y, num_rows, BT, V, NW)
            thread_barrier()
    else:
        fetch_two(s_do, do, i_first, i_value, s_y, d_errors, i_first, i_value, do_y_arrived)
        fetch(s_q, q, i_first, i_key, q_arrived)
        fetch_two(s_k, k, i_first, i_key, s_e, errors, i_first, i_value, k_arrived)
        fetch(s_out, dk_tiles, i_first, i_key, dk_arrived)
    o_t = gl.arange(0, BT, layout=L_t)
    # dq and dk are stored from shared memory, so that whole cache lines are written.
    L_out: gl.constexpr = copy_layout(BK, NW)
    o_out = gl.arange(0, BT, layout=gl.SliceLayout(1, L_out))
    o_tk = o_out[:, None] * (H * K) + (i_kb * BK + gl.arange(0, BK, layout=gl.SliceLayout(0, L_out)))[None, :]
    o_Sk = i_kb * BK + gl.arange(0, BK, layout=gl.SliceLayout(1, L_S))
    o_kv = o_Sk[:, None] * V + gl.arange(0, V, layout=gl.SliceLayout(0, L_S))[None, :]
    b_S = gl.load(states + (i_span.to(gl.int64) * H + i_h) * K * V + o_kv).to(gl.float32)
    zero = gl.zeros([BT, BK], gl.float32, layout=L_d)
    b_start_q, b_start_k, b_end = _scaled_factors(beta, decays, rows, i_chunk, num_rows, scale, H, BT, L_t)
    chunk_decay = decay_of_chunk(decays, i_chunk, num_rows, BT)
    for i in range(num_chunks):
        phase = i & 1
        # The next chunk's rows (against time every chunk but the segment's last is whole); 0 where there is none.
        left = gl.where(i + 1 < num_chunks, BT if REVERSE else num_rows - BT, 0)
        i_next = i_first + step * BT
        next_rows = rows + step * BT * H
        # Always 0, which the compiler cannot see: it would keep the addresses of all products in registers.
        i_zero = (rows >> 62).to(gl.int32)
        s_St = s_all_S.index(i_zero).permute((1, 0))
        s_all_S.index(0).store(b_S.to(low))
        if REVERSE:
            # (14): e dS^T.
            mbarrier.wait(e_arrived, phase)
            publish()
            b_dk = warpgroup_mma(s_all.index(i_zero), s_St, zero, use_acc=False, is_async=True)
            # (11), with the row factors on q and k.
            mbarrier.wait(k_arrived, phase)
            s_q.store((b_start_q[:, None] * s_q.load(L_d).to(gl.float32)).to(low))
            b_k = s_k.load(L_d).to(gl.float32)
            s_k.store((b_start_k[:, None] * b_k).to(low))
            b_S = chunk_decay * b_S
            mbarrier.wait(do_y_arrived, phase)
            publish()
            b_S = warpgroup_mma(s_q.permute((1, 0)), s_do, b_S, is_async=True)
            b_S = warpgroup_mma(s_k.permute((1, 0)), s_y, b_S, is_async=True)
            b_dk = warpgroup_mma_wait(2, deps=[b_dk])
            thread_barrier()
            if left > 0:
                fetch(s_e, errors, i_next, i_value, e_arrived)
            # The rest of (14), and (15).
            b_dk = b_end[:, None] * b_dk
            b_term = gl.sum(b_k * b_dk, 1)
            s_out.store(b_dk.to(low))
        else:
            # (12) and (13): do S^T and y S^T.
            mbarrier.wait(do_y_arrived, phase)
            publish()
            b_dq = warpgroup_mma(s_all.index(2 + i_zero), s_St, zero, use_acc=False, is_async=True)
            b_dk = warpgroup_mma(s_all.index(1 + i_zero), s_St, zero, use_acc=False, is_async=True)
            b_dq = warpgroup_mma_wait(1, deps=[b_dq])
            mbarrier.wait(q_arrived, phase)
            # The rest of (12), and its part of (15); dq leaves from q's place.
            b_dq = b_start_q[:, None] * b_dq
            b_term = gl.sum(s_q.load(L_d).to(gl.float32) * b_dq, 1)
            s_q.store(b_dq.to(low))
            b_dk = warpgroup_mma_wait(0, deps=[b_dk])
            mbarrier.wait(k_arrived, phase)
            publish()
            if left > 0:
                store_tile(dq_tiles, [i_first, i_key], s_q)
                fetch_two(s_do, do, i_next, i_value, s_y, d_errors, i_next, i_value, do_y_arrived)
            # The rest of (13), and its part of (15); k takes its row factor for (8).
            b_k = s_k.load(L_d).to(gl.float32)
            s_k.store((b_end[:, None] * b_k).to(low))
            b_dk = b_start_k[:, None] * b_dk
            b_term += gl.sum(b_k * b_dk, 1)
            mbarrier.wait(dk_arrived, phase)
            s_out.store((s_out.load(L_d).to(gl.float32) + b_dk).to(low))
            # (8), which reads e last.
            b_S = chunk_decay * b_S
            tma.store_wait(pendings=0)
            publish()
            b_S = warpgroup_mma(s_k.permute((1, 0)), s_e, b_S, is_async=True)
            if left > 0:
                store_tile(dk_tiles, [i_first, i_key], s_out)
                fetch(s_q, q, i_next, i_key, q_arrived)
        # The sums, and dk against time, whose last chunk may need a mask.
        i_part = i_chunk * (K // BK) + i_kb
        b_term = gl.where(o_t < num_rows, b_term, 0.0)
        gl.store(row_terms + i_part * BT + o_t, b_term)
        gl.store(totals + i_part, gl.sum(b_term, 0))
        if REVERSE:
            gl.store(dk + rows * K + o_tk, s_out.load(L_out), mask=(o_out < num_rows)[:, None])
        # The next chunk's factors, and its tiles once the state's products are done.
        num_rows, rows, i_first = left, next_rows, i_next
        i_chunk += step * H
        b_start_q, b_start_k, b_end = _scaled_factors(beta, decays, rows, i_chunk, left, scale, H, BT, L_t)
        chunk_decay = decay_of_chunk(decays, i_chunk, left, BT)
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        if not REVERSE:
            tma.store_wait(pendings=0)
        thread_barrier()
        if left > 0:
            if REVERSE:
                fetch_two(s_q, q, i_first, i_key, s_k, k, i_first, i_key, k_arrived)
                fetch_two(s_do, do, i_first, i_value, s_y, d_errors, i_first, i_value, do_y_arrived)
            else:
                fetch_two(s_k, k, i_first, i_key, s_e, errors, i_first, i_value, k_arrived)
                fetch(s_out, dk_tiles, i_first, i_key, dk_arrived)
    # The last chunk's dq and dk, masked: its tile may reach into the next segment.
    if not REVERSE:
        start = gl.load(cu_seqlens + i_s) + (gl.load(span_index + i_span) * SPAN + num_chunks - 1) * BT
        m_tk = (start + o_out < gl.load(cu_seqlens + i_s + 1))[:, None]
        o_tk += (start.to(gl.int64) * H + i_h) * K
        gl.store(dq + o_tk, s_q.load(L_out), mask=m_tk)
        gl.store(dk + o_tk, s_out.load(L_out), mask=m_tk)


def state_gradients(
    *,
    inputs: Inputs,
    rows: ErrorRows,
    decays: torch.Tensor,
    chunks: Chunks,
    states: torch.Tensor,
    so_far: StateGradients | None,
) -> StateGradients:
    """As the general set's."""
    k = inputs.k
    (_, heads, key_size), value_size = k.shape, rows.do.shape[2]
    launch = state_gradients_launch(key_size, value_size)
    parts, reverse = key_size // launch.tile, so_far is None
    gradients = StateGradients.empty(k, chunks.num_slots, CHUNK, parts) if reverse else so_far.with_dq(inputs.q)
    state_gradients_kernel[(chunks.num_span_slots * heads * parts,)](
        q=tiles(inputs.q, launch.tile),
        k=tiles(k, launch.tile),
        beta=inputs.beta,
        decays=decays,
        errors=tiles(rows.errors, value_size),
        d_errors=tiles(rows.d_errors, value_size),
        do=tiles(rows.do, value_size),
        states=states,
        cu_seqlens=chunks.cu_seqlens,
        chunk_offsets=chunks.table.offsets,
        span_segment=chunks.spans.segment,
        span_index=chunks.spans.index,
        dq=gradients.dq,
        dk=gradients.dk,
        dq_tiles=None if reverse else tiles(gradients.dq, launch.tile),
        dk_tiles=None if reverse else tiles(gradients.dk, launch.tile),
        row_terms=gradients.row_terms[int(reverse)],
        totals=gradients.totals[int(reverse)],
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=launch.tile,
        SPAN=SPAN,
        REVERSE=reverse,
        num_warps=launch.num_warps,
        num_stages=1,
    )
    return gradients
