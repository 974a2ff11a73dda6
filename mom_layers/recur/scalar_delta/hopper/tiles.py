"""What the gated delta rule's kernels for Hopper share beside `mom_layers.recur.hopper_tiles`: the tiles of a chunk,
its factors, and sums over states.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from mom_layers.common.triton_versions import fetch_tile
from mom_layers.recur.hopper_tiles import copy_layout


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
