"""The gradients inside a chunk, for Hopper. Names and equations as in `triton.local_gradients`.

One kernel instead of two: dP and dN stay in shared memory, where both they and their transposes can be left operands.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from mom_layers.common.triton_versions import thread_barrier
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN, Chunks
from mom_layers.recur.hopper_tiles import copy_layout, copy_rows, product_layout, publish, shared_layout
from mom_layers.recur.scalar_delta.hopper.launches import LOCAL_GRADIENTS
from mom_layers.recur.scalar_delta.tensors import ErrorRows, Inputs, StateGradients


@gluon.jit
def _decay_between(b_g, BT: gl.constexpr, layout: gl.constexpr):
    """exp(G_i - G_j) [BT, BT], zero above the diagonal; G in two parts, as `triton.chunk_local` explains."""
    o_i = gl.arange(0, BT, layout=gl.SliceLayout(1, layout))
    o_j = gl.arange(0, BT, layout=gl.SliceLayout(0, layout))
    below = o_i[:, None] >= o_j[None, :]
    b_G = gl.sum(gl.where(below, b_g.to(gl.float64)[None, :], 0.0), 1)
    b_high = b_G.to(gl.float32)
    b_low = (b_G - b_high.to(gl.float64)).to(gl.float32)
    other: gl.constexpr = gl.SliceLayout(0, layout)
    b_between = b_high[:, None] - gl.convert_layout(b_high, other)[None, :]
    b_between += b_low[:, None] - gl.convert_layout(b_low, other)[None, :]
    return gl.exp(gl.where(below, b_between, float("-inf")))


@gluon.jit
def _decay_gradient(
    totals, boundary, chunk_offsets, span_offsets, i_c, i_s, i_h, i_index, num_slots,
    H: gl.constexpr, SPAN: gl.constexpr, PARTS: gl.constexpr, BOUNDARY_PARTS: gl.constexpr,
    FROM_ZERO: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """exp(G_last) <S, dS> as the general set's function of this name computes it, with 32 lanes for every sum."""
    i_place = i_index % SPAN
    i_span = (gl.load(span_offsets + i_s) + i_index // SPAN).to(gl.int64) * H + i_h
    i_left = gl.load(chunk_offsets + i_s + 1) - i_c
    known = FROM_ZERO | (i_index >= SPAN)
    num_later = gl.minimum(SPAN - i_place, i_left)
    from_start = gl.where(known, (2.0 * num_later - 1.0) / (2.0 * num_later + 2.0 * i_place), 0.0)
    o = gl.arange(0, 32, layout=layout)
    o_chunk = o - i_place
    m_span = (o < SPAN) & (o_chunk < i_left)
    p_totals = totals + ((i_c + o_chunk).to(gl.int64) * H + i_h) * PARTS
    to_state = num_slots.to(gl.int64) * H * PARTS
    b_sum = gl.zeros([32], gl.float32, layout=layout)
    for i_part in gl.static_range(PARTS):
        b_from = gl.load(p_totals + i_part, mask=m_span, other=0.0)
        b_to = gl.load(p_totals + to_state + i_part, mask=m_span & (o_chunk < i_left - 1), other=0.0)
        b_sum += gl.where(o_chunk > 0, b_from, 0.0) - gl.where(o_chunk >= 0, b_to, 0.0)
        b_sum += from_start * (b_to - b_from)
    p_boundary = boundary + i_span * BOUNDARY_PARTS + o
    b_sum += (1.0 - from_start) * gl.load(p_boundary, mask=o < BOUNDARY_PARTS, other=0.0)
    m_before = (o < BOUNDARY_PARTS) & (i_index >= SPAN)
    b_sum += from_start * gl.load(p_boundary - H * BOUNDARY_PARTS, mask=m_before, other=0.0)
    return gl.sum(b_sum, 0)


@gluon.jit(do_not_specialize=["num_segments", "num_slots"])
def local_gradients_kernel(
    q,
    k,
    g,
    beta,
    scores,
    errors,
    d_errors,
    do,
    row_terms,
    totals,
    boundary,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    chunk_offsets,
    span_offsets,
    dq,
    dk,
    dg,
    dbeta,
    scale,
    num_segments,
    num_slots,
    H: gl.constexpr,
    K: gl.constexpr,
    V: gl.constexpr,
    BT: gl.constexpr,
    BK: gl.constexpr,
    SPAN: gl.constexpr,
    PARTS: gl.constexpr,
    BOUNDARY_PARTS: gl.constexpr,
    FROM_ZERO: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Equations (16) to (22) of one chunk and head. dq and dk hold the parts that come through the states already."""
    low: gl.constexpr = k.dtype.element_ty
    NW: gl.constexpr = num_warps
    i_c, i_h = gl.program_id(0) // H, gl.program_id(0) % H
    i_s = gl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_index = gl.load(chunk_index + i_c)
    i_row = gl.load(cu_seqlens + i_s) + i_index * BT
    left = gl.load(cu_seqlens + i_s + 1) - i_row
    i_chunk = i_c.to(gl.int64) * H + i_h
    rows = i_row.to(gl.int64) * H + i_h

    L_tt: gl.constexpr = product_layout(BT, BT, NW)
    L_i: gl.constexpr = gl.SliceLayout(1, L_tt)
    L_j: gl.constexpr = gl.SliceLayout(0, L_tt)
    L_d: gl.constexpr = product_layout(BT, BK, NW)
    L_v: gl.constexpr = copy_layout(V, NW)
    # Two wide buffers and one for e, so that two programs share a multiprocessor: q and k follow do and y there.
    wide: gl.constexpr = max(K, V)
    s_1 = gl.allocate_shared_memory(low, [BT, wide], shared_layout(BT, wide, low))
    s_2 = gl.allocate_shared_memory(low, [BT, wide], shared_layout(BT, wide, low))
    s_e = gl.allocate_shared_memory(low, [BT, V], shared_layout(BT, V, low))
    s_do, s_y = s_1.slice(0, V, dim=1), s_2.slice(0, V, dim=1)
    s_q, s_k = s_1.slice(0, K, dim=1), s_2.slice(0, K, dim=1)
    copy_rows(s_do, do + rows * V, H * V, left, BT, V, NW)
    copy_rows(s_y, d_errors + rows * V, H * V, left, BT, V, NW)
    copy_rows(s_e, errors + rows * V, H * V, left, BT, V, NW)
    async_copy.commit_group()
    # While the tiles come: (22), the exponents of the states and of the chunk's decay.
    o_i = gl.arange(0, BT, layout=L_i)
    o_j = gl.arange(0, BT, layout=L_j)
    b_beta_i = gl.load(beta + rows + o_i * H, mask=o_i < left, other=0.0).to(gl.float32)
    b_beta_j = gl.convert_layout(b_beta_i, L_j)
    b_g = gl.load(g + rows + o_j * H, mask=o_j < left, other=0.0).to(gl.float32)
    b_P = gl.load(scores + i_chunk * BT * BT + o_i[:, None] * BT + o_j[None, :]).to(gl.float32)
    b_dG = gl.zeros([BT], gl.float32, layout=L_i)
    b_d_to_end = gl.zeros([BT], gl.float32, layout=L_i)
    p_from_state = row_terms + i_chunk * PARTS * BT
    p_to_state = p_from_state + num_slots.to(gl.int64) * H * PARTS * BT
    for i_part in gl.static_range(PARTS):
        b_dG += gl.load(p_from_state + i_part * BT + o_i)
        b_d_to_end += gl.load(p_to_state + i_part * BT + o_i)
    d_chunk_decay = _decay_gradient(
        totals, boundary, chunk_offsets, span_offsets, i_c, i_s, i_h, i_index, num_slots,
        H, SPAN, PARTS, BOUNDARY_PARTS, FROM_ZERO, L_j,
    )  # fmt: skip
    b_between = _decay_between(b_g, BT, L_tt)

    # The products of (18) and (19); meanwhile (16) and (17).
    zero = gl.zeros([BT, BT], gl.float32, layout=L_tt)
    async_copy.wait_group(0)
    publish()
    b_dP = warpgroup_mma(s_do, s_e.permute((1, 0)), zero, use_acc=False, is_async=True)
    b_dN = warpgroup_mma(s_y, s_e.permute((1, 0)), zero, use_acc=False, is_async=True)
    o_row = gl.arange(0, BT, layout=gl.SliceLayout(1, L_v))
    o_tv = o_row[:, None] * (H * V) + gl.arange(0, V, layout=gl.SliceLayout(0, L_v))[None, :]
    b_y = s_y.load(L_v).to(gl.float32)
    b_dbeta = gl.sum(b_y * s_e.load(L_v).to(gl.float32), 1)
    b_beta = gl.load(beta + rows + o_row * H, mask=o_row < left, other=0.0).to(gl.float32)
    gl.store(d_errors + rows * V + o_tv, (b_beta[:, None] * b_y).to(low), mask=(o_row < left)[:, None])
    gl.store(dbeta + rows + o_row * H, b_dbeta.to(dbeta.dtype.element_ty), mask=o_row < left)
    b_dP, b_dN = warpgroup_mma_wait(0, deps=[b_dP, b_dN])
    thread_barrier()
    # dq and dk are loaded and stored through shared memory, so that whole cache lines are read and written.
    s_dq = gl.allocate_shared_memory(low, [2, BT, BK], shared_layout(BT, BK, low))
    s_dk = gl.allocate_shared_memory(low, [2, BT, BK], shared_layout(BT, BK, low))
    copy_rows(s_dq.index(0), dq + rows * K, H * K, left, BT, BK, NW)
    copy_rows(s_dk.index(0), dk + rows * K, H * K, left, BT, BK, NW)
    copy_rows(s_q, q + rows * K, H * K, left, BT, K, NW)
    copy_rows(s_k, k + rows * K, H * K, left, BT, K, NW)
    async_copy.commit_group()

    # The factors of (18) and (19), and P's part of (22), which leaves i = j out.
    below = o_i[:, None] > o_j[None, :]
    b_dP = b_dP * (scale * b_beta_j)[None, :]
    b_exponent = gl.where(below, b_dP * b_P, 0.0)
    b_dG += gl.sum(b_exponent, 1) - gl.convert_layout(gl.sum(b_exponent, 0), L_i)
    b_dN = gl.where(below, b_dN * b_between * b_beta_i[:, None] * -b_beta_j[None, :], 0.0)
    s_dP = gl.allocate_shared_memory(low, [BT, BT], shared_layout(BT, BT, low))
    s_dN = gl.allocate_shared_memory(low, [BT, BT], shared_layout(BT, BT, low))
    s_dP.store((b_dP * b_between).to(low))
    s_dN.store(b_dN.to(low))
    async_copy.wait_group(0)
    publish()

    # (20) and (21), BK columns at a time, with N's part of (22) on the way. The four products of a step run at once,
    # while the next step's dq and dk are fetched.
    L_out: gl.constexpr = copy_layout(BK, NW)
    o_t = gl.arange(0, BT, layout=gl.SliceLayout(1, L_out))
    o_k = gl.arange(0, BK, layout=gl.SliceLayout(0, L_out))
    empty = gl.zeros([BT, BK], gl.float32, layout=L_d)
    for i_k in gl.static_range(0, K, BK):
        s_kb, s_qb = s_k.slice(i_k, BK, dim=1), s_q.slice(i_k, BK, dim=1)
        s_dqb, s_dkb = s_dq.index(i_k // BK % 2), s_dk.index(i_k // BK % 2)
        b_earlier = warpgroup_mma(s_dN, s_kb, empty, use_acc=False, is_async=True)
        b_later = warpgroup_mma(s_dN.permute((1, 0)), s_kb, empty, use_acc=False, is_async=True)
        b_dk = warpgroup_mma(s_dP.permute((1, 0)), s_qb, empty, use_acc=False, is_async=True)
        b_dq = warpgroup_mma(s_dP, s_kb, empty, use_acc=False, is_async=True)
        if i_k + BK < K:
            copy_rows(s_dq.index(1 - i_k // BK % 2), dq + rows * K + i_k + BK, H * K, left, BT, BK, NW)
            copy_rows(s_dk.index(1 - i_k // BK % 2), dk + rows * K + i_k + BK, H * K, left, BT, BK, NW)
        async_copy.commit_group()
        b_earlier, b_later = warpgroup_mma_wait(2, deps=[b_earlier, b_later])
        b_dG += gl.convert_layout(gl.sum(s_kb.load(L_d).to(gl.float32) * (b_earlier - b_later), 1), L_i)
        b_dk, b_dq = warpgroup_mma_wait(0, deps=[b_dk, b_dq])
        s_dqb.store((s_dqb.load(L_d).to(gl.float32) + b_dq).to(low))
        s_dkb.store((s_dkb.load(L_d).to(gl.float32) + b_dk + b_earlier + b_later).to(low))
        async_copy.wait_group(0)
        thread_barrier()
        p_out = rows * K + i_k + o_t[:, None] * (H * K) + o_k[None, :]
        gl.store(dq + p_out, s_dqb.load(L_out), mask=(o_t < left)[:, None])
        gl.store(dk + p_out, s_dkb.load(L_out), mask=(o_t < left)[:, None])

    # (22): from the exponents to g, whose row t is part of G from t on, and of G_last - G before t.
    b_dg = gl.sum(gl.where(o_i[:, None] >= o_j[None, :], b_dG[:, None], b_d_to_end[:, None]), 0) + d_chunk_decay
    gl.store(dg + rows + o_j * H, b_dg.to(dg.dtype.element_ty), mask=o_j < left)


def local_gradients(
    *,
    inputs: Inputs,
    rows: ErrorRows,
    scores: torch.Tensor,
    chunks: Chunks,
    so_far: StateGradients,
    boundary: torch.Tensor,
    from_zero: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the general set's."""
    (_, heads, key_size), value_size = inputs.k.shape, rows.do.shape[2]
    slots = chunks.num_slots
    dg, dbeta = torch.empty_like(inputs.g), torch.empty_like(inputs.beta)
    launch = LOCAL_GRADIENTS[max(key_size, value_size)]
    local_gradients_kernel[(slots * heads,)](
        q=inputs.q,
        k=inputs.k,
        g=inputs.g,
        beta=inputs.beta,
        scores=scores,
        errors=rows.errors,
        d_errors=rows.d_errors,
        do=rows.do,
        row_terms=so_far.row_terms,
        totals=so_far.totals,
        boundary=boundary,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        chunk_offsets=chunks.table.offsets,
        span_offsets=chunks.spans.offsets,
        dq=so_far.dq,
        dk=so_far.dk,
        dg=dg,
        dbeta=dbeta,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        num_slots=slots,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=launch.tile,
        SPAN=SPAN,
        PARTS=so_far.parts,
        BOUNDARY_PARTS=boundary.shape[2],
        FROM_ZERO=from_zero,
        num_warps=launch.num_warps,
        maxnreg=launch.registers,
    )
    return dg, dbeta
