"""What Hopper's kernels share: tiles of a chunk's rows that are copied to shared memory, and layouts.

The kernels are written in Gluon, Triton's lower level, because their speed depends on when a copy starts and on which
products wait for which: the next chunk is copied to shared memory while this chunk is computed, and products that do
not need each other run at the same time. Left operands are always in shared memory (`triton.chunk_local` of a family
says why). A tile is copied by TMA, which takes one thread and no registers for addresses. A tile's rows past a
segment's end belong to the next segment, and are cleared or masked.

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
def tile_layout(rows, columns, dtype):
    """The layout in shared memory of a tile [rows, columns]."""
    return shared_layout(rows, columns, getattr(gl, str(dtype).removeprefix("torch.")))


def tiles(x, columns, rows=CHUNK):
    """[R, H, C] or [N, H, I, J] as rows of [R, H C] or [N H I, J], in tiles of ``rows``, a chunk's, by ``columns``.

    The tensor is contiguous, in bf16 or fp16, and may have no rows. A tile that is stored must lie inside the tensor.
    """
    width = x.shape[-1] if x.dim() == 4 else x.shape[1] * x.shape[2]
    if x.numel() == 0 or x.data_ptr() % 16:
        x = x.clone() if x.numel() else x.new_empty(width)
    layout = tile_layout(rows, columns, x.dtype)
    return TileDescriptor(x, [x.numel() // width, width], [width, 1], [rows, columns], layout)


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
def store_rows(pointer, s_rows, valid, stride, ROWS: gl.constexpr, COLUMNS: gl.constexpr, NW: gl.constexpr):
    """Stores the first ``valid`` rows of a tile in shared memory, to rows that are ``stride`` apart."""
    layout: gl.constexpr = copy_layout(COLUMNS, NW)
    o_r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    o_c = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, layout))
    gl.store(pointer + o_r[:, None] * stride + o_c[None, :], s_rows.load(layout), mask=(o_r < valid)[:, None])


@gluon.jit
def store_state(pointer, s_S, K: gl.constexpr, V: gl.constexpr, BV: gl.constexpr, NW: gl.constexpr):
    """Stores [K, BV] columns of a state from shared memory, in slices that need few registers."""
    SLICE: gl.constexpr = 32
    layout: gl.constexpr = copy_layout(BV, NW)
    o_k = gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    o_v = gl.arange(0, BV, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(K // SLICE):
        gl.store(pointer + i * SLICE * V + o_k[:, None] * V + o_v[None, :], s_S.slice(i * SLICE, SLICE).load(layout))
