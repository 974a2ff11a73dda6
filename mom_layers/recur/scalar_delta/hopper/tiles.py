"""What Hopper's kernels share: tiles of a chunk's rows that are copied to shared memory, and layouts.

The kernels are written in Gluon, Triton's lower level, because their speed depends on when a copy starts and on which
products wait for which: the next chunk is copied to shared memory while this chunk is computed, and products that do
not need each other run at the same time. Left operands are always in shared memory (`triton.chunk_local` says why). A
tile is copied by TMA, which takes one thread and no registers for addresses. A tile's rows past a segment's end belong
to the next segment, and are cleared or masked.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import functools

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from mom_layers.common.triton_versions import TileDescriptor, copy_to_shared, fetch_tile, thread_barrier
from mom_layers.recur.chunk_table import CHUNK


@gluon.constexpr_function
def copy_layout(columns, num_warps):
    """16 bytes a thread, rows of whole cache lines."""
    lanes = min(32, columns // 8)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def product_layout(rows, columns, num_warps):
    """Accumulators [rows, columns]: warpgroups share the rows as far as those reach, then the columns."""
    along_rows = min(num_warps, rows // 16)
    return gl.NVMMADistributedLayout(
        [3, 0], [along_rows, num_warps // along_rows], [16, columns * along_rows // num_warps, 16]
    )


@gluon.constexpr_function
def shared_layout(rows, columns, dtype):
    """The layout of a matrix in shared memory that products read."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


@functools.cache
def tile_layout(columns, dtype):
    """The layout in shared memory of a tile of a chunk's rows."""
    return shared_layout(CHUNK, columns, getattr(gl, str(dtype).removeprefix("torch.")))


def tiles(x, columns):
    """[R, H, C] or [N, H, BT, BT] as rows of [R, H C] or [N H BT, BT], in tiles of a chunk's rows by ``columns``.

    The tensor is contiguous, in bf16 or fp16, and may have no rows. A tile that is stored must lie inside the tensor.
    """
    width = x.shape[-1] if x.dim() == 4 else x.shape[1] * x.shape[2]
    if x.numel() == 0 or x.data_ptr() % 16:
        x = x.clone() if x.numel() else x.new_empty(width)
    return TileDescriptor(x, [x.numel() // width, width], [width, 1], [CHUNK, columns], tile_layout(columns, x.dtype))


@gluon.jit
def copy_rows(shared, source, stride, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, NW: gl.constexpr):
    """Starts to copy [ROWS, COLUMNS] to shared memory; rows from `valid` on become zero."""
    layout: gl.constexpr = copy_layout(COLUMNS, NW)
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    pointers = source + o_r[:, None] * stride + o_c[None, :]
    copy_to_shared(shared, pointers, mask=(o_r < valid)[:, None])


@gluon.jit
def fetch(shared, tiles, row, column, arrived):
    """Starts to copy one tile of a tensor [R, C] to shared memory. Rows past the tensor's end become zero."""
    mbarrier.expect(arrived, tiles.block_type.nbytes)
    fetch_tile(tiles, [row, column], arrived, shared)


@gluon.jit
def fetch_two(shared, tiles, row, column, other_shared, other_tiles, other_row, other_column, arrived):
    """Starts to copy two tiles that arrive together."""
    mbarrier.expect(arrived, tiles.block_type.nbytes + other_tiles.block_type.nbytes)
    fetch_tile(tiles, [row, column], arrived, shared)
    fetch_tile(other_tiles, [other_row, other_column], arrived, other_shared)


@gluon.jit
def fetch_chunk(places, tensors, i_buffer, row, i_key, i_value, i_chunk_row, arrived):
    """Starts to copy all tiles of a chunk, each to place `i_buffer` of two: k, q, v (or do), X and P."""
    s_k, s_q, s_v = places[0].index(i_buffer), places[1].index(i_buffer), places[2].index(i_buffer)
    s_X, s_P = places[3].index(i_buffer), places[4].index(i_buffer)
    k, q, v, solve, scores = tensors
    barrier = arrived.index(i_buffer)
    mbarrier.expect(barrier, 2 * k.block_type.nbytes + v.block_type.nbytes + 2 * solve.block_type.nbytes)
    fetch_tile(k, [row, i_key], barrier, s_k)
    fetch_tile(q, [row, i_key], barrier, s_q)
    fetch_tile(v, [row, i_value], barrier, s_v)
    fetch_tile(solve, [i_chunk_row, 0], barrier, s_X)
    fetch_tile(scores, [i_chunk_row, 0], barrier, s_P)


@gluon.jit
def clear_rows(shared, valid, ROWS: gl.constexpr, COLUMNS: gl.constexpr, NW: gl.constexpr):
    """Zeroes a tile's rows from `valid` on, which belong to another segment. The tile is [ROWS, COLUMNS]."""
    SLICE: gl.constexpr = 16
    layout: gl.constexpr = copy_layout(COLUMNS, NW)
    o_r = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    zero = gl.zeros([SLICE, COLUMNS], shared.dtype, layout=layout)
    for i in gl.static_range(ROWS // SLICE):
        rows = shared.slice(i * SLICE, SLICE)
        rows.store(gl.where((i * SLICE + o_r < valid)[:, None], rows.load(layout), zero))


@gluon.jit
def publish():
    """Makes what this thread wrote to shared memory visible to every thread's products."""
    fence_async_shared()
    thread_barrier()


@gluon.jit
def row_factors(
    beta, decays, rows, i_chunk, left, H: gl.constexpr, BT: gl.constexpr, layout: gl.constexpr
):  # fmt: skip
    """beta, exp(G) and exp(G_last - G) of a chunk's rows [BT]; zero from row `left` on, where the segment ends."""
    o_t = gl.arange(0, BT, layout=layout)
    b_beta = gl.load(beta + rows + o_t * H, mask=o_t < left, other=0.0).to(gl.float32)
    b_from_start = gl.load(decays + i_chunk * 2 * BT + o_t, mask=o_t < left, other=0.0)
    b_to_end = gl.load(decays + i_chunk * 2 * BT + BT + o_t, mask=o_t < left, other=0.0)
    return b_beta, b_from_start, b_to_end


@gluon.jit
def decay_of_chunk(decays, i_chunk, left, BT: gl.constexpr):
    """exp(G_last) of a chunk; zero where no rows are left."""
    return gl.load(decays + i_chunk * 2 * BT + BT - 1, mask=left > 0, other=0.0)


@gluon.jit
def store_state(pointer, s_S, K: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, NW: gl.constexpr):
    """Stores [K, BV] columns of a state from shared memory, in slices that need few registers."""
    SLICE: gl.constexpr = 32
    layout: gl.constexpr = copy_layout(BV, NW)
    o_k = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    o_v = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(K // SLICE):
        gl.store(pointer + i * SLICE * V + o_k[:, None] * V + o_v[None, :], s_S.slice(i * SLICE, SLICE).load(layout))


@gluon.jit
def state_product(pointer, s_S, K: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, NW: gl.constexpr):
    """The sum over [K, BV] of a state in memory times one in shared memory."""
    SLICE: gl.constexpr = 32
    layout: gl.constexpr = copy_layout(BV, NW)
    o_k = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    o_v = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    b_sum = gl.zeros([SLICE, BV], gl.float32, layout=layout)
    for i in gl.static_range(K // SLICE):
        b_S = gl.load(pointer + i * SLICE * V + o_k[:, None] * V + o_v[None, :]).to(gl.float32)
        b_sum += b_S * s_S.slice(i * SLICE, SLICE).load(layout).to(gl.float32)
    return gl.sum(gl.sum(b_sum, 1), 0)
