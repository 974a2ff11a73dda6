"""Triton kernels of a matrix product whose weight depends on the row's group, reading tokens by index.

The number of rows in a group is known only on the device, so the grid is an upper bound known on the host: group g owns
the row tiles from ``memory_offsets[g - 1] // BM + g`` on, at least as many as it needs, ``R // BM + G`` in all, and
programs past a group's end return.

Shape legend: R rows, N tokens, slots rows a token, G groups, D inputs, O outputs. Strides are compile-time constants,
so that rows of any multiple of 16 bytes are read in vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from mom_layers.route.rows_triton import sum_rows_triton


class Tile(NamedTuple):
    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int


# Reasoned, not tuned: in 16 bits at most 97 KiB of shared memory and 64 sums a thread, so that a multiprocessor of an
# H200 runs two programs and of an A100 one. float32 has no tensor core at full precision: its tile must fit registers.
SIXTEEN_BITS = Tile(BM=128, BN=128, BK=64, num_warps=8, num_stages=3)
TILES = {
    torch.bfloat16: SIXTEEN_BITS,
    torch.float16: SIXTEEN_BITS,
    torch.float32: Tile(BM=64, BN=64, BK=16, num_warps=8, num_stages=2),
}
INDEX_STAGES = 2  # more stages for the weight's gradient, so that token numbers too are loaded ahead of their use
ROW_TILES_TOGETHER = 8  # row tiles that run over all columns before the next ones, so that both operands stay in L2


@triton.jit
def _rows_of_tile(i_tile, memory_offsets, G: tl.constexpr, BG: tl.constexpr, BM: tl.constexpr):
    """(group, first row, one past the group's last row) of a row tile."""
    b_g = tl.arange(0, BG)
    b_start = tl.load(memory_offsets + b_g - 1, mask=(b_g > 0) & (b_g < G), other=0)  # [BG]
    i_g = tl.sum(((b_g < G) & (b_start // BM + b_g <= i_tile)).to(tl.int32), axis=0) - 1
    start = tl.sum(tl.where(b_g == i_g, b_start, 0), axis=0)
    end = tl.load(memory_offsets + i_g)
    return i_g, start + (i_tile - start // BM - i_g) * BM, end


@triton.jit(do_not_specialize=["num_row_tiles"])
def _project_kernel(
    a, weight, out, token_of_row, memory_offsets, num_row_tiles, stride_a: tl.constexpr,
    stride_weight_g: tl.constexpr, stride_weight_n: tl.constexpr, stride_weight_k: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BG: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[r, n] = sum_k a[r, k] weight[group(r), n, k], or a[token_of_row[r], k] where token_of_row is given."""
    NUM_COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    i_program = tl.program_id(0)
    i_band = i_program // (TOGETHER * NUM_COLUMN_TILES)
    i_inside = i_program % (TOGETHER * NUM_COLUMN_TILES)
    band_rows = tl.minimum(num_row_tiles - i_band * TOGETHER, TOGETHER)
    i_g, first, end = _rows_of_tile(i_band * TOGETHER + i_inside % band_rows, memory_offsets, G, BG, BM)
    if first >= end:
        return

    b_r = first + tl.arange(0, BM)
    m_r = b_r < end
    b_n = (i_inside // band_rows) * BN + tl.arange(0, BN)
    m_n = b_n < N
    b_k = tl.arange(0, BK)
    b_from = b_r
    if token_of_row is not None:
        b_from = tl.load(token_of_row + b_r, mask=m_r, other=0)  # [BM]
    p_a = a + b_from.to(tl.int64)[:, None] * stride_a + b_k[None, :]
    p_w = weight + i_g.to(tl.int64) * stride_weight_g + b_k[:, None] * stride_weight_k + b_n[None, :] * stride_weight_n
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i_k in range(0, K, BK):
        m_k = i_k + b_k < K
        b_a = tl.load(p_a + i_k, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [BM, BK]
        b_w = tl.load(p_w + i_k * stride_weight_k, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        b_sum = tl.dot(b_a, b_w, b_sum, input_precision="ieee")
    p_out = out + b_r.to(tl.int64)[:, None] * N + b_n[None, :]
    tl.store(p_out, b_sum.to(out.dtype.element_ty), mask=m_r[:, None] & m_n[None, :])


@triton.jit
def _weight_gradient_kernel(
    dy, x, dweight, token_of_row, memory_offsets, stride_dy: tl.constexpr, stride_x: tl.constexpr,
    OUT: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """dweight[g, o, d] = sum over the rows r of group g of dy[r, o] x[token_of_row[r], d]; zero for an empty group."""
    i_g = tl.program_id(1)
    NUM_COLUMN_TILES: tl.constexpr = (D + BN - 1) // BN
    b_o = (tl.program_id(0) // NUM_COLUMN_TILES) * BM + tl.arange(0, BM)
    b_d = (tl.program_id(0) % NUM_COLUMN_TILES) * BN + tl.arange(0, BN)
    m_o = b_o < OUT
    m_d = b_d < D
    start = tl.load(memory_offsets + i_g - 1, mask=i_g > 0, other=0)
    end = tl.load(memory_offsets + i_g)
    b_sum = tl.zeros([BM, BN], dtype=tl.float32)
    for i_r in range(start, end, BK):
        b_r = i_r + tl.arange(0, BK)
        m_r = b_r < end
        b_token = tl.load(token_of_row + b_r, mask=m_r, other=0)  # [BK]
        p_dy = dy + b_r.to(tl.int64)[None, :] * stride_dy + b_o[:, None]
        p_x = x + b_token.to(tl.int64)[:, None] * stride_x + b_d[None, :]
        b_dy = tl.load(p_dy, mask=m_o[:, None] & m_r[None, :], other=0.0)  # [BM, BK]
        b_x = tl.load(p_x, mask=m_r[:, None] & m_d[None, :], other=0.0)  # [BK, BN]
        b_sum = tl.dot(b_dy, b_x, b_sum, input_precision="ieee")
    p_dw = dweight + (i_g.to(tl.int64) * OUT + b_o)[:, None] * D + b_d[None, :]
    tl.store(p_dw, b_sum.to(dweight.dtype.element_ty), mask=m_o[:, None] & m_d[None, :])


def _project(a, weight, plan, token_of_row):
    """a [N or R, K], weight [G, O, K] of any strides. Returns [R, O]."""
    groups, columns, _ = weight.shape
    tile = TILES[a.dtype]
    row_tiles = plan.num_rows // tile.BM + groups
    out = torch.empty(plan.num_rows, columns, dtype=a.dtype, device=a.device)
    _project_kernel[(row_tiles * triton.cdiv(columns, tile.BN),)](
        a=a,
        weight=weight,
        out=out,
        token_of_row=token_of_row,
        memory_offsets=plan.memory_offsets,
        stride_a=a.stride(0),
        stride_weight_g=weight.stride(0),
        stride_weight_n=weight.stride(1),
        stride_weight_k=weight.stride(2),
        num_row_tiles=row_tiles,
        N=columns,
        K=weight.shape[2],
        G=groups,
        BG=triton.next_power_of_2(groups),
        TOGETHER=ROW_TILES_TOGETHER,
        **tile._asdict(),
    )
    return out


def _weight_gradient(dy, x, weight, plan):
    groups, outputs, inputs = weight.shape
    tile = TILES[x.dtype]
    dweight = torch.empty(groups, outputs, inputs, dtype=weight.dtype, device=weight.device)
    _weight_gradient_kernel[(triton.cdiv(outputs, tile.BM) * triton.cdiv(inputs, tile.BN), groups)](
        dy=dy,
        x=x,
        dweight=dweight,
        token_of_row=plan.token_of_row,
        memory_offsets=plan.memory_offsets,
        stride_dy=dy.stride(0),
        stride_x=x.stride(0),
        OUT=outputs,
        D=inputs,
        **tile._replace(num_stages=tile.num_stages + INDEX_STAGES)._asdict(),
    )
    return dweight


class GroupedProjection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, plan):
        ctx.save_for_backward(x, weight)
        ctx.plan = plan
        return _project(x, weight, plan, plan.token_of_row)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        if dy.stride(1) != 1:
            dy = dy.contiguous()
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = sum_rows_triton(_project(dy, weight.transpose(1, 2), ctx.plan, None), ctx.plan.row_of_choice)
        if ctx.needs_input_grad[1]:
            dweight = _weight_gradient(dy, x, weight, ctx.plan)
        return dx, dweight, None


def grouped_projection_triton(x: torch.Tensor, weight: torch.Tensor, plan) -> torch.Tensor:
    """Projects every row of the plan with its memory's weight, reading the tokens in place.

        rows[r] = weight[group(r)] x[token_of_row[r]]

    Args:
        x: [N, D] in float32, bfloat16 or float16 with adjacent channels.
        weight: [G, O, D] in x's dtype, one matrix for every group of the plan.
        plan: the RoutingPlan; row r belongs to the first group with ``r < plan.memory_offsets[group]``.

    Returns:
        rows [R, O] in x's dtype. Sums are in float32; float32 inputs are multiplied in full precision.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    if x.dim() != 2 or x.dtype not in TILES or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            "x must be float32, bfloat16 or float16 [N, D] with adjacent channels, "
            f"got {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )
    if weight.dim() != 3 or weight.dtype != x.dtype or weight.shape[2] != x.shape[1]:
        raise ValueError(
            f"weight must be {x.dtype} [G, O, {x.shape[1]}] as x is, got {weight.dtype} {list(weight.shape)}"
        )
    if weight.shape[0] != plan.num_all_memories:
        raise ValueError(f"weight has {weight.shape[0]} groups; the plan has {plan.num_all_memories}")
    if x.shape[0] != plan.row_of_choice.shape[0]:
        raise ValueError(f"x has {x.shape[0]} tokens; the plan has {plan.row_of_choice.shape[0]}")
    return GroupedProjection.apply(x, weight, plan)
