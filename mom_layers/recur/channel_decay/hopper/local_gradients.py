"""dq, dk and dg of whole chunks, for Hopper. Names and equations as in `triton.local_gradients`.

A thread holds one channel of many rows, so that sums over rows move little between threads.

Shape legend: rows R, heads H, key size K, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from mom_layers.common.triton_versions import fetch_tile, store_tile
from mom_layers.recur.channel_decay.hopper.launches import ROW_GRADIENTS
from mom_layers.recur.channel_decay.tensors import Inputs, StateParts
from mom_layers.recur.channel_decay.triton.block_gradients import block_gradients
from mom_layers.recur.channel_decay.triton.launches import launches_for
from mom_layers.recur.channel_decay.triton.local_gradients import score_gradients
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.hopper_tiles import (
    copy_layout,
    fetch_two,
    product_layout,
    publish,
    shared_layout,
    store_rows,
    tiles,
)

LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def column_layout(rows, columns, num_warps):
    """A warp has 32 columns, and a thread one of them: all rows, or as many as warps are left to share the rows."""
    along_columns = min(num_warps, columns // 32)
    along_rows = num_warps // along_columns
    return gl.BlockedLayout([rows // along_rows, 1], [1, 32], [along_rows, along_columns], [1, 0])


@gluon.jit
def _add(x, y):
    return x + y


@gluon.jit
def _add_with_before(sum_x, before_x, sum_y, before_y):
    """Of rows x and the rows y after them: the sum, and the sum of the rows before the last row."""
    return sum_x + sum_y, sum_x + before_y


@gluon.jit
def _store(tiles, pointer, s_rows, row, column, left, stride, BT: gl.constexpr, BK: gl.constexpr, NW: gl.constexpr):
    """Stores a chunk's tile from shared memory; of a segment's last chunk the rows that are the segment's."""
    if left < BT:
        store_rows(pointer, s_rows, left, stride, BT, BK, NW)
    else:
        store_tile(tiles, [row, column], s_rows)


@gluon.jit(do_not_specialize=["num_segments"])
def row_gradients_kernel(
    q,
    k,
    g,
    u,
    w,
    d_decays,
    d_scores,
    whole_chunks,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    dq,
    dk,
    dg,
    dq_tiles,
    dk_tiles,
    dg_tiles,
    num_segments,
    H: gl.constexpr,
    K: gl.constexpr,
    BT: gl.constexpr,
    BK: gl.constexpr,
    num_warps: gl.constexpr,
):
    """Equations (16) to (19) for BK channels of one chunk and head that are whole. dq, dk and dg leave from the places
    of u, w and g in shared memory."""
    NW: gl.constexpr = num_warps
    low: gl.constexpr = q.dtype
    pair: gl.constexpr = gl.bfloat16
    i_kb = gl.program_id(0) % (K // BK)
    i_h = gl.program_id(0) // (K // BK) % H
    i_c = gl.program_id(0) // (K // BK) // H
    i_chunk = i_c.to(gl.int64) * H + i_h
    # Loaded together: no load waits for another one. Meaningless past the last chunk.
    i_s, i_index, whole = gl.load(chunk_segment + i_c), gl.load(chunk_index + i_c), gl.load(whole_chunks + i_chunk)
    if (i_s >= num_segments) | (whole == 0):
        return
    i_row = gl.load(cu_seqlens + i_s) + i_index * BT
    left = gl.load(cu_seqlens + i_s + 1) - i_row
    i_key = i_h * K + i_kb * BK

    # Columns: a channel of many rows a thread. Products: accumulators of rows by channels.
    L_c: gl.constexpr = column_layout(BT, BK, NW)
    L_d: gl.constexpr = product_layout(BT, BK, NW)
    L_P: gl.constexpr = copy_layout(BT, NW)
    s_g = gl.allocate_shared_memory(g.dtype, [BT, BK], shared_layout(BT, BK, g.dtype))
    s_q = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_k = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_u = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_w = gl.allocate_shared_memory(low, [BT, BK], shared_layout(BT, BK, low))
    s_dP = gl.allocate_shared_memory(pair, [BT, BT], shared_layout(BT, BT, pair))
    s_q_pair = gl.allocate_shared_memory(pair, [BT, BK], shared_layout(BT, BK, pair))
    s_k_pair = gl.allocate_shared_memory(pair, [BT, BK], shared_layout(BT, BK, pair))
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(arrived.index(i), count=1)
    mbarrier.expect(arrived.index(0), g.block_type.nbytes + q.block_type.nbytes + k.block_type.nbytes)
    fetch_tile(g, [i_row, i_key], arrived.index(0), s_g)
    fetch_tile(q, [i_row, i_key], arrived.index(0), s_q)
    fetch_tile(k, [i_row, i_key], arrived.index(0), s_k)
    fetch_two(s_u, u, i_row, i_key, s_w, w, i_row, i_key, arrived.index(1))

    p_dP = d_scores + i_chunk * BT * BT
    o_i = gl.arange(0, BT, layout=gl.SliceLayout(1, L_P))[:, None]
    o_j = gl.arange(0, BT, layout=gl.SliceLayout(0, L_P))[None, :]
    s_dP.store(gl.where(o_i > o_j, gl.load(p_dP + o_i * BT + o_j).to(gl.float32), 0.0).to(pair))
    o_t = gl.arange(0, BT, layout=gl.SliceLayout(1, L_c))
    o_k = gl.arange(0, BK, layout=gl.SliceLayout(0, L_c))
    b_diagonal = gl.load(p_dP + o_t * (BT + 1)).to(gl.float32)[:, None]
    b_d_decays = gl.load(d_decays + i_chunk * K + i_kb * BK + o_k)[None, :]

    # Rows past the segment's end are the next segment's: they count as zero.
    m_t = (o_t < left)[:, None]
    mbarrier.wait(arrived.index(0), 0)
    b_g = gl.where(m_t, gl.maximum(s_g.load(L_c).to(gl.float32) * LOG2_E, -160.0), 0.0)
    b_half = 0.5 * gl.sum(b_g, 0)
    b_c = gl.associative_scan(b_g, 0, _add) - b_half[None, :]
    b_half = gl.exp2(b_half)[None, :]
    s_q_pair.store(gl.where(m_t, s_q.load(L_c).to(gl.float32) * gl.exp2(b_c), 0.0).to(pair))
    s_k_pair.store(gl.where(m_t, s_k.load(L_c).to(gl.float32) * gl.exp2(-b_c), 0.0).to(pair))
    publish()
    zero = gl.zeros([BT, BK], gl.float32, layout=L_d)
    b_x = warpgroup_mma(s_dP, s_k_pair, zero, use_acc=False, is_async=True)
    b_y = warpgroup_mma(s_dP.permute((1, 0)), s_q_pair, zero, use_acc=False, is_async=True)
    mbarrier.wait(arrived.index(1), 0)
    b_x, b_y = warpgroup_mma_wait(0, deps=[b_x, b_y])

    # dq, dk, and the terms of (19). Both sums over a pair take the same rounded factors: the pairs of which both rows
    # are in the sum cancel.
    b_x = gl.convert_layout(b_x, L_c) + gl.where(m_t, b_half * s_u.load(L_c).to(gl.float32), 0.0)
    s_u.store((gl.exp2(b_c) * b_x + b_diagonal * s_k.load(L_c).to(gl.float32)).to(low))
    b_later = s_q_pair.load(L_c).to(gl.float32) * b_x
    b_y = gl.convert_layout(b_y, L_c)
    b_later -= s_k_pair.load(L_c).to(gl.float32) * b_y
    b_w = b_half * s_w.load(L_c).to(gl.float32)
    b_to = gl.exp2(-b_c)
    s_w.store((b_to * (b_y + b_w) + b_diagonal * s_q.load(L_c).to(gl.float32)).to(low))
    b_earlier = s_k.load(L_c).to(gl.float32) * b_to * b_w
    _, b_earlier = gl.associative_scan((b_earlier, gl.zeros_like(b_earlier)), 0, _add_with_before)
    b_dg = gl.associative_scan(b_later, 0, _add, reverse=True) + b_earlier + b_d_decays
    s_g.store(b_dg.to(g.dtype))
    publish()
    rows = (i_row.to(gl.int64) * H + i_h) * K + i_kb * BK
    _store(dq_tiles, dq + rows, s_u, i_row, i_key, left, H * K, BT, BK, NW)
    _store(dk_tiles, dk + rows, s_w, i_row, i_key, left, H * K, BT, BK, NW)
    _store(dg_tiles, dg + rows, s_g, i_row, i_key, left, H * K, BT, BK, NW)
    tma.store_wait(pendings=0)


def row_gradients(
    inputs: Inputs,
    chunks: Chunks,
    parts: StateParts,
    whole_chunks: torch.Tensor,
    d_scores: torch.Tensor,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """As the general set's."""
    heads, k_dim = inputs.num_heads, inputs.k_dim
    tile = ROW_GRADIENTS.tile
    dq, dk, dg = gradients
    row_gradients_kernel[(chunks.num_slots * heads * (k_dim // tile),)](
        q=tiles(inputs.q, tile),
        k=tiles(inputs.k, tile),
        g=tiles(inputs.g, tile),
        u=tiles(parts.u, tile),
        w=tiles(parts.w, tile),
        d_decays=parts.d_decays,
        d_scores=d_scores,
        whole_chunks=whole_chunks,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        dq=dq,
        dk=dk,
        dg=dg,
        dq_tiles=tiles(dq, tile),
        dk_tiles=tiles(dk, tile),
        dg_tiles=tiles(dg, tile),
        num_segments=chunks.num_segments,
        H=heads,
        K=k_dim,
        BT=CHUNK,
        BK=tile,
        num_warps=ROW_GRADIENTS.num_warps,
        num_stages=1,
    )


def local_gradients(
    *, inputs: Inputs, do: torch.Tensor, chunks: Chunks, parts: StateParts, whole_chunks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As the general set's, whose kernels compute dP and the chunks that are not whole."""
    q, k, g = inputs.q, inputs.k, inputs.g
    launches = launches_for(q.device, q.dtype, inputs.k_dim, inputs.v_dim)
    d_scores = score_gradients(inputs, do, chunks, launches.score_gradients)
    gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)
    row_gradients(inputs, chunks, parts, whole_chunks, d_scores, gradients)
    block_gradients(inputs, chunks, parts, whole_chunks, d_scores, gradients, launches.block_gradients)
    return gradients
