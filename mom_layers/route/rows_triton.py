"""Triton kernels of the sum over a token's rows, which is the gradient of a gather, without atomics; and of zeros in
spare rows.

Shape legend: N tokens, R rows, C channels, choices of a token k + 1 (k without the shared memory). Tiles are BT tokens
by BC channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = (16, 128)  # BT and BC; not tuned


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_rows_kernel(
    rows, row_of_choice, out, num_tokens, C: tl.constexpr, CHOICES: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr
):
    """out[t] = sum over i of rows[row_of_choice[t, i]], without the choices that have row -1."""
    b_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_t = b_t < num_tokens
    m_tile = m_t[:, None] & (b_c < C)[None, :]
    # A token's rows lie far apart; each is read once, in whole vectors.
    b_sum = tl.zeros([BT, BC], dtype=tl.float32)
    for i_choice in tl.static_range(CHOICES):
        b_r = tl.load(row_of_choice + b_t * CHOICES + i_choice, mask=m_t, other=-1).to(tl.int64)  # [BT]
        m_row = m_tile & (b_r >= 0)[:, None]
        b_sum += tl.load(rows + b_r[:, None] * C + b_c[None, :], mask=m_row, other=0.0).to(tl.float32)  # [BT, BC]
    tl.store(out + b_t[:, None] * C + b_c[None, :], b_sum.to(out.dtype.element_ty), mask=m_tile)


def sum_rows_triton(rows: torch.Tensor, row_of_choice: torch.Tensor) -> torch.Tensor:
    """rows [R, C] and row_of_choice [N, k + 1] int32, both contiguous, to the tokens' sums [N, C] in the rows' type."""
    (tokens, choices), channels = row_of_choice.shape, rows.shape[1]
    BT, BC = TILE
    out = torch.empty(tokens, channels, dtype=rows.dtype, device=rows.device)
    _sum_rows_kernel[(triton.cdiv(tokens, BT), triton.cdiv(channels, BC))](
        rows=rows,
        row_of_choice=row_of_choice,
        out=out,
        num_tokens=tokens,
        C=channels,
        CHOICES=choices,
        BT=BT,
        BC=BC,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _zero_spare_rows_kernel(rows, first_spare, num_rows, C: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """rows[r] = 0 from row first_spare[0] on. A program whose rows are all in use returns."""
    i_first = tl.program_id(0) * BT
    first = tl.load(first_spare)
    if i_first + BT <= first:
        return
    b_r = (i_first + tl.arange(0, BT)).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_tile = ((b_r >= first) & (b_r < num_rows))[:, None] & (b_c < C)[None, :]
    tl.store(rows + b_r[:, None] * C + b_c[None, :], tl.zeros([BT, BC], rows.dtype.element_ty), mask=m_tile)


def zero_spare_rows_triton(rows: torch.Tensor, first_spare: torch.Tensor) -> None:
    """Writes zeros into rows [R, C], contiguous, from row first_spare [1] int32 on."""
    BT, BC = TILE
    num_rows, channels = rows.shape
    _zero_spare_rows_kernel[(triton.cdiv(num_rows, BT), triton.cdiv(channels, BC))](
        rows=rows, first_spare=first_spare, num_rows=num_rows, C=channels, BT=BT, BC=BC, num_warps=4
    )
