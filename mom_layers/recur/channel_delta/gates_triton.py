"""The log decay of Kimi Delta Attention in Triton, from the low-rank raw gate and the rule's parameters.

For one head, with x the raw gate of a row (rank numbers) and W its map to K numbers:

    (1)  z = x W + dt_bias
    (2)  g = -exp(A_log) softplus(z)

PyTorch writes z and three more tensors of g's size, the largest of the rule's inputs; here a pass writes g alone, and
the backward pass computes z again. Products are exact in float32.

Shape legend: rows R, heads H, key size K.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from mom_layers.common.activations_triton import softplus
from mom_layers.common.sums_triton import sum_of_vector, sum_parts

# Rows a program, and columns that its loop takes at a time; not tuned.
ROWS_TILE, COLUMNS_TILE = 128, 32
PRECISION = tl.constexpr("ieee")


@triton.jit
def _load_rows(raw, b_r, m_r, i_h, stride, RANK: tl.constexpr):
    """x of BR rows and one head, [BR, RANK] float32."""
    o_d = i_h * RANK + tl.arange(0, RANK)
    return tl.load(raw + b_r.to(tl.int64)[:, None] * stride + o_d[None, :], mask=m_r[:, None], other=0.0).to(tl.float32)


@triton.jit
def _logits(b_x, up, bias, i_h, o_k, K: tl.constexpr, RANK: tl.constexpr):
    """Equation (1) for BK columns, and their part of W [RANK, BK]."""
    b_up = tl.load(up + i_h * RANK * K + tl.arange(0, RANK)[:, None] * K + o_k[None, :]).to(tl.float32)  # [RANK, BK]
    b_bias = tl.load(bias + i_h * K + o_k).to(tl.float32)  # [BK]
    return tl.dot(b_x, b_up, input_precision=PRECISION) + b_bias[None, :], b_up


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    raw, A_log, bias, up, g, num_rows, stride,
    H: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (2) for BR rows of one head."""
    i_r, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    b_r = i_r * BR + tl.arange(0, BR)
    m_r = b_r < num_rows
    b_x = _load_rows(raw, b_r, m_r, i_h, stride, RANK)
    rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_z, _ = _logits(b_x, up, bias, i_h, o_k, K, RANK)
        p_g = g + (b_r.to(tl.int64) * H + i_h)[:, None] * K + o_k[None, :]
        tl.store(p_g, -rate * softplus(b_z), mask=m_r[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    raw, A_log, bias, up, dg, d_raw, d_rate_parts, d_bias_parts, d_up_parts, num_rows, stride,
    H: tl.constexpr, K: tl.constexpr, RANK: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The raw gate's gradient for BR rows of one head, and these rows' part of the gradients of the parameters."""
    i_r, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    b_r = i_r * BR + tl.arange(0, BR)
    m_r = b_r < num_rows
    i_part = i_r.to(tl.int64) * H + i_h
    o_d = tl.arange(0, RANK)
    b_x = _load_rows(raw, b_r, m_r, i_h, stride, RANK)
    rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    b_dx = tl.zeros([BR, RANK], tl.float32)
    b_d_log = tl.zeros([BR], tl.float32)
    for i_k in range(0, K, BK):
        o_k = i_k + tl.arange(0, BK)
        b_z, b_up = _logits(b_x, up, bias, i_h, o_k, K, RANK)
        p_g = (b_r.to(tl.int64) * H + i_h)[:, None] * K + o_k[None, :]
        b_dg = tl.load(dg + p_g, mask=m_r[:, None], other=0.0).to(tl.float32)  # [BR, BK]
        # The derivative of g by A_log is g itself; softplus' is sigmoid.
        b_d_log += tl.sum(b_dg * (-rate * softplus(b_z)), 1)
        b_dz = -rate * tl.sigmoid(b_z) * b_dg
        b_dx += tl.dot(b_dz, tl.trans(b_up), input_precision=PRECISION)
        b_d_up = tl.dot(tl.trans(b_x), b_dz, input_precision=PRECISION)  # [RANK, BK]
        tl.store(d_up_parts + i_part * RANK * K + o_d[:, None] * K + o_k[None, :], b_d_up)
        tl.store(d_bias_parts + i_part * K + o_k, tl.sum(b_dz, 0))
    tl.store(d_rate_parts + i_part + tl.arange(0, 1), sum_of_vector(b_d_log))
    p_dx = d_raw + b_r.to(tl.int64)[:, None] * (H * RANK) + i_h * RANK + o_d[None, :]
    tl.store(p_dx, b_dx.to(d_raw.dtype.element_ty), mask=m_r[:, None])


class LowRankDecay(torch.autograd.Function):
    """Keeps the raw gate and the parameters."""

    @staticmethod
    def forward(ctx, raw, A_log, bias, up):
        rows, (heads, rank, k_dim) = raw.shape[0], up.shape
        g = torch.empty(rows, heads, k_dim, dtype=torch.float32, device=raw.device)
        if rows:
            _forward_kernel[(triton.cdiv(rows, ROWS_TILE) * heads,)](
                raw=raw,
                A_log=A_log,
                bias=bias,
                up=up,
                g=g,
                num_rows=rows,
                stride=raw.stride(0),
                H=heads,
                K=k_dim,
                RANK=rank,
                BR=ROWS_TILE,
                BK=min(COLUMNS_TILE, k_dim),
                num_warps=4,
            )
        ctx.save_for_backward(raw, A_log, bias, up)
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx, dg):
        raw, A_log, bias, up = ctx.saved_tensors
        rows, (heads, rank, k_dim) = raw.shape[0], up.shape
        blocks = triton.cdiv(rows, ROWS_TILE)
        d_raw = torch.empty(rows, heads * rank, dtype=raw.dtype, device=raw.device)
        parts = [
            torch.empty(blocks, heads, *shape, dtype=torch.float32, device=raw.device)
            for shape in ((), (k_dim,), (rank, k_dim))
        ]
        if rows:
            _backward_kernel[(blocks * heads,)](
                raw=raw,
                A_log=A_log,
                bias=bias,
                up=up,
                dg=dg.contiguous(),
                d_raw=d_raw,
                d_rate_parts=parts[0],
                d_bias_parts=parts[1],
                d_up_parts=parts[2],
                num_rows=rows,
                stride=raw.stride(0),
                H=heads,
                K=k_dim,
                RANK=rank,
                BR=ROWS_TILE,
                BK=min(COLUMNS_TILE, k_dim),
                num_warps=4,
            )
        sums = [sum_parts(part, torch.float32).to(x.dtype) for part, x in zip(parts, (A_log, bias, up), strict=True)]
        return d_raw, *sums


def low_rank_decay_triton(
    raw: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor, up: torch.Tensor
) -> torch.Tensor:
    """``g = -exp(A_log) softplus(raw up + dt_bias)`` (arXiv 2510.26692), [R, H, K] float32.

    Args:
        raw: [R, H * rank], float32 or 16 bits; may be columns of a wider tensor.
        A_log: [H].
        dt_bias: [H, K].
        up: [H, rank, K]; rank is 16 or a larger power of two, K is in HEAD_SIZES.

    Raises:
        ValueError: shapes that do not agree.
    """
    heads, rank, k_dim = up.shape
    if raw.dim() != 2 or raw.shape[1] != heads * rank or A_log.shape != (heads,) or dt_bias.shape != (heads, k_dim):
        raise ValueError(
            f"for up {list(up.shape)} raw must be [R, {heads * rank}], A_log [{heads}] and dt_bias {[heads, k_dim]}, "
            f"got {list(raw.shape)}, {list(A_log.shape)} and {list(dt_bias.shape)}"
        )
    raw = raw if raw.stride(1) == 1 else raw.contiguous()
    return LowRankDecay.apply(raw, A_log.contiguous(), dt_bias.contiguous(), up.contiguous())
