"""Triton kernel of the sum over a token's rows, which is the gradient of a gather, without atomics.

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
    """out[t] = sum over i of rows[row_of_choice[t, i]]."""
    b_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_t = b_t < num_tokens
    m_tile = m_t[:, None] & (b_c < C)[None, :]
    # A token's rows lie far apart; each is read once, in whole vectors.
    b_sum = tl.zeros([BT, BC], dtype=tl.float32)
    for i_choice in tl.static_range(CHOICES):
        b_r = tl.load(row_of_choice + b_t * CHOICES + i_choice, mask=m_t, other=0).to(tl.int64)  # [BT]
        b_sum += tl.load(rows + b_r[:, None] * C + b_c[None, :], mask=m_tile, other=0.0).to(tl.float32)  # [BT, BC]
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
