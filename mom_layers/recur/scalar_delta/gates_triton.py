"""The gated delta rule's two gates in Triton: the log decay g and the write strength beta, from the raw gates.

The numbers are few, but PyTorch needs a dozen small operations for them; here a pass is one launch:

    (1)  g = -exp(A_log) softplus(a + dt_bias)
    (2)  beta = sigmoid(raw_beta)

Shape legend: rows R, heads H.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from mom_layers.common.activations_triton import softplus
from mom_layers.common.sums_triton import sum_parts

# Rows a program; not tuned.
ROWS_TILE = 128


@triton.jit(do_not_specialize=["num_rows"])
def _forward_kernel(
    raw_beta, raw_a, A_log, dt_bias, g, beta, num_rows, stride_beta, stride_a,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Equations (1) and (2) for BR rows and all heads."""
    b_r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    b_h = tl.arange(0, BH)[None, :]
    m = (b_r < num_rows) & (b_h < H)
    b_beta = tl.load(raw_beta + b_r * stride_beta + b_h, mask=m, other=0.0).to(tl.float32)
    b_a = tl.load(raw_a + b_r * stride_a + b_h, mask=m, other=0.0).to(tl.float32)
    b_rate = tl.exp(tl.load(A_log + b_h, mask=b_h < H, other=0.0).to(tl.float32))
    b_bias = tl.load(dt_bias + b_h, mask=b_h < H, other=0.0).to(tl.float32)
    tl.store(g + b_r * H + b_h, -b_rate * softplus(b_a + b_bias), mask=m)
    tl.store(beta + b_r * H + b_h, tl.sigmoid(b_beta), mask=m)


@triton.jit(do_not_specialize=["num_rows"])
def _backward_kernel(
    raw_a, A_log, dt_bias, g, beta, dg, dbeta, d_raw_beta, d_raw_a, parts, num_rows, stride_a,
    H: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The gradients of the raw gates for BR rows and all heads, and these rows' part [2, H] of dA_log and d_bias."""
    b_r = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)[:, None]
    b_h = tl.arange(0, BH)[None, :]
    m = (b_r < num_rows) & (b_h < H)
    b_a = tl.load(raw_a + b_r * stride_a + b_h, mask=m, other=0.0).to(tl.float32)
    b_rate = tl.exp(tl.load(A_log + b_h, mask=b_h < H, other=0.0).to(tl.float32))
    b_bias = tl.load(dt_bias + b_h, mask=b_h < H, other=0.0).to(tl.float32)
    b_g = tl.load(g + b_r * H + b_h, mask=m, other=0.0)
    b_dg = tl.load(dg + b_r * H + b_h, mask=m, other=0.0).to(tl.float32)
    # Through (1): softplus' is sigmoid.
    b_da = -b_dg * b_rate * tl.sigmoid(b_a + b_bias)
    # Through (2), from beta as the forward pass stored it.
    b_beta = tl.load(beta + b_r * H + b_h, mask=m, other=0.0)
    b_dbeta = tl.load(dbeta + b_r * H + b_h, mask=m, other=0.0).to(tl.float32) * b_beta * (1.0 - b_beta)
    tl.store(d_raw_a + b_r * H + b_h, b_da.to(d_raw_a.dtype.element_ty), mask=m)
    tl.store(d_raw_beta + b_r * H + b_h, b_dbeta.to(d_raw_beta.dtype.element_ty), mask=m)
    # The derivative of g by A_log is g itself, and by dt_bias the same as by a; sum_parts adds the programs' parts.
    p_parts = parts + tl.program_id(0) * 2 * H + tl.arange(0, BH)
    m_h = tl.arange(0, BH) < H
    tl.store(p_parts, tl.sum(tl.where(m, b_dg * b_g, 0.0), axis=0), mask=m_h)
    tl.store(p_parts + H, tl.sum(tl.where(m, b_da, 0.0), axis=0), mask=m_h)


class DecayGates(torch.autograd.Function):
    """Keeps a, the parameters and both results."""

    @staticmethod
    def forward(ctx, raw_beta, raw_a, A_log, dt_bias):
        rows, heads = raw_a.shape
        g, beta = torch.empty(2, rows, heads, dtype=torch.float32, device=raw_a.device).unbind()
        if rows:
            _forward_kernel[(triton.cdiv(rows, ROWS_TILE),)](
                raw_beta=raw_beta,
                raw_a=raw_a,
                A_log=A_log,
                dt_bias=dt_bias,
                g=g,
                beta=beta,
                num_rows=rows,
                stride_beta=raw_beta.stride(0),
                stride_a=raw_a.stride(0),
                H=heads,
                BR=ROWS_TILE,
                BH=triton.next_power_of_2(heads),
                num_warps=4,
            )
        ctx.save_for_backward(raw_a, A_log, dt_bias, g, beta)
        return g, beta

    @staticmethod
    @once_differentiable
    def backward(ctx, dg, dbeta):
        raw_a, A_log, dt_bias, g, beta = ctx.saved_tensors
        rows, heads = raw_a.shape
        blocks = triton.cdiv(rows, ROWS_TILE)
        d_raw_beta, d_raw_a = torch.empty(2, rows, heads, dtype=raw_a.dtype, device=raw_a.device).unbind()
        parts = torch.empty(blocks, 2, heads, dtype=torch.float32, device=raw_a.device)
        if rows:
            _backward_kernel[(blocks,)](
                raw_a=raw_a,
                A_log=A_log,
                dt_bias=dt_bias,
                g=g,
                beta=beta,
                dg=dg.contiguous(),
                dbeta=dbeta.contiguous(),
                d_raw_beta=d_raw_beta,
                d_raw_a=d_raw_a,
                parts=parts,
                num_rows=rows,
                stride_a=raw_a.stride(0),
                H=heads,
                BR=ROWS_TILE,
                BH=triton.next_power_of_2(heads),
                num_warps=4,
            )
        dA_log, d_bias = sum_parts(parts, torch.float32).unbind()
        return d_raw_beta, d_raw_a, dA_log.to(A_log.dtype), d_bias.to(dt_bias.dtype)


def decay_gates_triton(
    raw_beta: torch.Tensor, raw_a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``g = -exp(A_log) softplus(a + dt_bias)`` and ``beta = sigmoid(raw_beta)`` (arXiv 2412.06464), in float32.

    Args:
        raw_beta, raw_a: [R, H] raw gates of one type, float32 or 16 bits; they may be columns of a wider tensor.
        A_log, dt_bias: [H].

    Returns:
        g and beta, [R, H] float32.

    Raises:
        ValueError: shapes or types that do not agree.
    """
    if raw_a.dim() != 2 or raw_beta.shape != raw_a.shape or raw_beta.dtype != raw_a.dtype:
        raise ValueError(
            f"raw_beta and raw_a must be [R, H] of one type, got {list(raw_beta.shape)} {raw_beta.dtype} and "
            f"{list(raw_a.shape)} {raw_a.dtype}"
        )
    if A_log.shape != raw_a.shape[1:] or dt_bias.shape != raw_a.shape[1:]:
        raise ValueError(
            f"A_log and dt_bias must be [{raw_a.shape[1]}], got {list(A_log.shape)} and {list(dt_bias.shape)}"
        )
    if raw_beta.stride(1) != 1 or raw_a.stride(1) != 1:
        raw_beta, raw_a = raw_beta.contiguous(), raw_a.contiguous()
    return DecayGates.apply(raw_beta, raw_a, A_log.contiguous(), dt_bias.contiguous())
