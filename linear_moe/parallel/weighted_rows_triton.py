"""Triton kernels of weighted sums over a token's rows, and of the products that are the weights' gradient.

Shape legend: tokens N, rows R, channels C, choices of a token k. A program computes one token, BC channels at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # BC at most; not tuned


@triton.jit
def _weighted_sum_kernel(rows, row_of_choice, weights, out, C: tl.constexpr, CHOICES: tl.constexpr, BC: tl.constexpr):
    """out[t] = sum over i of weights[t, i] rows[row_of_choice[t, i]], without the choices of row -1."""
    i_t = tl.program_id(0).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    b_sum = tl.zeros([BC], tl.float32)
    for i in tl.static_range(CHOICES):
        i_row = tl.load(row_of_choice + i_t * CHOICES + i).to(tl.int64)
        weight = tl.load(weights + i_t * CHOICES + i).to(tl.float32)
        b_sum += weight * tl.load(rows + i_row * C + b_c, mask=(b_c < C) & (i_row >= 0), other=0.0).to(tl.float32)
    tl.store(out + i_t * C + b_c, b_sum.to(out.dtype.element_ty), mask=b_c < C)


@triton.jit
def _row_products_kernel(rows, row_of_choice, tokens, out, C: tl.constexpr, CHOICES: tl.constexpr, BC: tl.constexpr):
    """out[t, i] = tokens[t] . rows[row_of_choice[t, i]]; zero for row -1."""
    i_t = tl.program_id(0).to(tl.int64)
    for i in tl.static_range(CHOICES):
        i_row = tl.load(row_of_choice + i_t * CHOICES + i).to(tl.int64)
        b_sum = tl.zeros([BC], tl.float32)
        for i_c in tl.static_range(0, C, BC):
            b_c = i_c + tl.arange(0, BC)
            mask = (b_c < C) & (i_row >= 0)
            b_row = tl.load(rows + i_row * C + b_c, mask=mask, other=0.0).to(tl.float32)
            b_sum += b_row * tl.load(tokens + i_t * C + b_c, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + i_t * CHOICES + i, tl.sum(b_sum, axis=0))


def weighted_sum_triton(rows: torch.Tensor, row_of_choice: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """rows [R, C], row_of_choice [N, k] int32, weights [N, k], all contiguous. Returns [N, C] in the rows' type."""
    (tokens, choices), channels = row_of_choice.shape, rows.shape[1]
    out = rows.new_empty(tokens, channels)
    block = min(BLOCK, triton.next_power_of_2(channels))
    _weighted_sum_kernel[(tokens, triton.cdiv(channels, block))](
        rows=rows, row_of_choice=row_of_choice, weights=weights, out=out, C=channels, CHOICES=choices, BC=block,
        num_warps=4,
    )  # fmt: skip
    return out


def row_products_triton(rows: torch.Tensor, row_of_choice: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """rows [R, C], row_of_choice [N, k] int32, tokens [N, C], all contiguous. Returns [N, k] float32."""
    choices, channels = row_of_choice.shape[1], rows.shape[1]
    out = torch.empty(row_of_choice.shape, dtype=torch.float32, device=rows.device)
    _row_products_kernel[(tokens.shape[0],)](
        rows=rows, row_of_choice=row_of_choice, tokens=tokens, out=out, C=channels, CHOICES=choices,
        BC=min(BLOCK, triton.next_power_of_2(channels)), num_warps=4,
    )  # fmt: skip
    return out
