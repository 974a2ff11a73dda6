"""Triton kernels of a matrix product whose weight depends on the row's memory, reading tokens by index.

The number of a memory's rows is known on the device only, so that the grid is an upper bound that the host computes:
memory m has the row tiles from ``memory_offsets[m - 1] // BM + m`` on, at least as many as its rows fill, and all
memories have ``R // BM + A`` of them. A program past its memory's last row returns.

Shape legend: R rows, N tokens, A all memories, D inputs of the projection, O outputs. In a product's kernel the tiles
are BM rows by BN columns of the result, and BK is the length of a step along the sum. Strides are compile-time
constants, so that rows of any multiple of 16 bytes are read in vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mom_layers.common.chips import chip_of


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# Not tuned, but chosen by size: in 16 bits at most 97 KiB of shared memory and 64 sums a thread, so that a
# multiprocessor of an H200 runs two programs and of an A100 one. No tensor core multiplies float32 at full precision,
# so that its tile must fit the registers.
SIXTEEN_BITS = Tile(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
TILES = {
    torch.bfloat16: SIXTEEN_BITS,
    torch.float16: SIXTEEN_BITS,
    torch.float32: Tile(BM=64, BN=64, BK=16, num_warps=8, num_stages=2),
}
INDEX_STAGES = 2  # more stages for the weight's gradient, whose token numbers are loaded ahead too; not tuned
INDEX_STAGES_FIT = 97 * 1024  # bytes of shared memory that the gradient takes with these stages; without them 64 KiB do
ROW_TILES_TOGETHER = 8  # row tiles that run over all columns before the next row tiles, so that L2 holds both operands


@triton.jit
def _rows_of_tile(i_tile, memory_offsets, A: tl.constexpr, BA: tl.constexpr, BM: tl.constexpr):
    """(memory, first row, one past the memory's last row) of a row tile."""
    b_m = tl.arange(0, BA)
    b_start = tl.load(memory_offsets + b_m - 1, mask=(b_m > 0) & (b_m < A), other=0)  # [BA]
    # The last memory whose first row tile is not after this tile.
    i_m = tl.sum(((b_m < A) & (b_start // BM + b_m <= i_tile)).to(tl.int32), axis=0) - 1
    start = tl.sum(tl.where(b_m == i_m, b_start, 0), axis=0)
    end = tl.load(memory_offsets + i_m)
    return i_m, start + (i_tile - start // BM - i_m) * BM, end


@triton.jit(do_not_specialize=["num_row_tiles"])
def _project_kernel(
    inputs, weight, out, token_of_row, memory_offsets, num_row_tiles, stride_inputs: tl.constexpr,
    stride_weight_m: tl.constexpr, stride_weight_n: tl.constexpr, stride_weight_k: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, A: tl.constexpr, BA: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum_k inputs[r, k] weight[memory of r, n, k]; inputs[token_of_row[r], k] with token_of_row."""
    # This program's tile: TOGETHER row tiles run over all columns, then the next row tiles.
    NUM_COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    i_program = tl.program_id(0)
    i_band = i_program // (TOGETHER * NUM_COLUMN_TILES)
    i_inside = i_program % (TOGETHER * NUM_COLUMN_TILES)
    band_rows = tl.minimum(num_row_tiles - i_band * TOGETHER, TOGETHER)
    i_m, first, end = _rows_of_tile(i_band * TOGETHER + i_inside % band_rows, memory_offsets, A, BA, BM)
    if first >= end:
        return

    # The sum over k, BK at a time.
    b_r = first + tl.arange(0, BM)
    m_r = b_r < end
    b_n = (i_inside // band_rows) * BN + tl.arange(0, BN)
    m_n = b_n < N
    b_k = tl.arange(0, BK)
    b_from = b_r
    if token_of_row is not None:
        b_from = tl.load(token_of_row + b_r, mask=m_r, other=0)  # [BM]
    p_in = inputs + b_from.to(tl.int64)[:, None] * stride_inputs + b_k[None, :]
    p_w = weight + i_m.to(tl.int64) * stride_weight_m + b_k[:, None] * stride_weight_k + b_n[None, :] * stride_weight_n
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, K, BK):
        m_k = i_k + b_k < K
        b_in = tl.load(p_in + i_k, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        b_w = tl.load(p_w + i_k * stride_weight_k, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        b_sum = tl.dot(b_in, b_w, b_sum, input_precision="ieee")
    # Masked stores: a tile of a memory's last rows must not write the next memory's.
    p_out = out + b_r.to(tl.int64)[:, None] * N + b_n[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_r[:, None] & m_n[None, :])


@triton.jit
def _weight_gradient_kernel(
    dy, x, dweight, token_of_row, memory_offsets, stride_dy: tl.constexpr, stride_x: tl.constexpr,
    OUT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dweight[m, o, d] = sum over the rows r of memory m of dy[r, o] x[token_of_row[r], d]; 0 where m has no rows."""
    i_m = tl.program_id(1)
    NUM_COLUMN_TILES: tl.constexpr = (D + BN - 1) // BN
    b_o = (tl.program_id(0) // NUM_COLUMN_TILES) * BM + tl.arange(0, BM)
    b_d = (tl.program_id(0) % NUM_COLUMN_TILES) * BN + tl.arange(0, BN)
    m_o = b_o < OUT
    m_d = b_d < D
    # The sum over the memory's rows, BK at a time.
    start = tl.load(memory_offsets + i_m - 1, mask=i_m > 0, other=0)
    end = tl.load(memory_offsets + i_m)
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i_r in range(start, end, BK):
        b_r = i_r + tl.arange(0, BK)
        m_r = b_r < end
        # x is read by token number, so that no gathered copy of x exists.
        b_token = tl.load(token_of_row + b_r, mask=m_r, other=0)  # [BK]
        p_dy = dy + b_r.to(tl.int64)[None, :] * stride_dy + b_o[:, None]
        p_x = x + b_token.to(tl.int64)[:, None] * stride_x + b_d[None, :]
        b_dy = tl.load(p_dy, mask=m_o[:, None] & m_r[None, :], other=0.0)  # [BM, BK]
        b_x = tl.load(p_x, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BK, BN]
        b_sum = tl.dot(b_dy, b_x, b_sum, input_precision="ieee")
    p_dw = dweight + (i_m.to(tl.int64) * OUT + b_o)[:, None] * D + b_d[None, :]
    tl.store(p_dw, b_sum.to(dweight.dtype.element_ty), mask=m_o[:, None] & m_d[None, :])


def project(inputs: torch.Tensor, weight: torch.Tensor, plan, token_of_row: torch.Tensor | None) -> torch.Tensor:
    """``out[r] = weight[memory of r] inputs[r]``, or ``inputs[token_of_row[r]]`` with token_of_row.

    Args:
        inputs: [R, K], or [N, K] with token_of_row; adjacent columns.
        weight: [A, O, K] of any strides, in the type of ``inputs``.
        plan: the :class:`~mom_layers.route.plan.RoutingPlan`.

    Returns:
        [R, O] in the type of ``inputs``.
    """
    all_memories, columns, _ = weight.shape
    tile = TILES[inputs.dtype]
    # Every memory may have one tile that is not full.
    row_tiles = plan.num_rows // tile.BM + all_memories
    out = torch.empty(plan.num_rows, columns, dtype=inputs.dtype, device=inputs.device)
    _project_kernel[(row_tiles * triton.cdiv(columns, tile.BN),)](
        inputs=inputs,
        weight=weight,
        out=out,
        token_of_row=token_of_row,
        memory_offsets=plan.memory_offsets,
        stride_inputs=inputs.stride(0),
        stride_weight_m=weight.stride(0),
        stride_weight_n=weight.stride(1),
        stride_weight_k=weight.stride(2),
        num_row_tiles=row_tiles,
        N=columns,
        K=weight.shape[2],
        A=all_memories,
        BA=triton.next_power_of_2(all_memories),
        TOGETHER=ROW_TILES_TOGETHER,
        **tile._asdict(),
    )
    return out


def weight_gradient(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, plan) -> torch.Tensor:
    """dy [R, O] and x [N, D] with adjacent columns. Returns the weight's gradient [A, O, D] in the weight's type."""
    all_memories, outputs, inputs = weight.shape
    tile = TILES[x.dtype]
    if chip_of(x.device).shared_memory >= INDEX_STAGES_FIT:
        tile = tile._replace(num_stages=tile.num_stages + INDEX_STAGES)
    dweight = torch.empty(all_memories, outputs, inputs, dtype=weight.dtype, device=weight.device)
    _weight_gradient_kernel[(triton.cdiv(outputs, tile.BM) * triton.cdiv(inputs, tile.BN), all_memories)](
        dy=dy,
        x=x,
        dweight=dweight,
        token_of_row=plan.token_of_row,
        memory_offsets=plan.memory_offsets,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        OUT=outputs,
        D=inputs,
        **tile._asdict(),
    )
    return dweight
