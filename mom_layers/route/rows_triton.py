"""Sums over rows in Triton, without atomics: a token's rows (the gradient of a gather), and programs' partial sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SUM_TILE = (16, 128)  # tokens and channels of a program that adds up a token's rows
PARTS_TILE = (256, 32)  # partial sums at a time, and columns of a program


@triton.jit(do_not_specialize=["num_tokens"])
def _sum_slots_kernel(
    rows, row_of_choice, out, num_tokens, D: tl.constexpr, SLOTS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    """out[t] = sum over slots of rows[row_of_choice[t, slot]]."""
    b_t = (tl.program_id(0) * BT + tl.arange(0, BT)).to(tl.int64)
    b_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_t = b_t < num_tokens
    m_tile = m_t[:, None] & (b_d < D)[None, :]
    b_sum = tl.zeros([BT, BD], dtype=tl.float32)
    for i_slot in tl.static_range(SLOTS):
        b_r = tl.load(row_of_choice + b_t * SLOTS + i_slot, mask=m_t, other=0).to(tl.int64)  # [BT]
        b_sum += tl.load(rows + b_r[:, None] * D + b_d[None, :], mask=m_tile, other=0.0).to(tl.float32)  # [BT, BD]
    tl.store(out + b_t[:, None] * D + b_d[None, :], b_sum.to(out.dtype.element_ty), mask=m_tile)


def sum_slots(rows: torch.Tensor, row_of_choice: torch.Tensor) -> torch.Tensor:
    """rows [R, C] to tokens [N, C]: the sum over a token's rows, row_of_choice [N, slots], in float32."""
    (tokens, slots), inputs = row_of_choice.shape, rows.shape[1]
    BT, BD = SUM_TILE
    out = torch.empty(tokens, inputs, dtype=rows.dtype, device=rows.device)
    _sum_slots_kernel[(triton.cdiv(tokens, BT), triton.cdiv(inputs, BD))](
        rows=rows,
        row_of_choice=row_of_choice,
        out=out,
        num_tokens=tokens,
        D=inputs,
        SLOTS=slots,
        BT=BT,
        BD=BD,
        num_warps=4,
    )
    return out


@triton.jit(do_not_specialize=["num_parts"])
def _sum_parts_kernel(
    parts, out, num_parts, N: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSE: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over p of parts[p, n]; or the transpose of out [N / COLUMNS, COLUMNS]."""
    b_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_p = tl.arange(0, BP)
    b_sum = tl.zeros([BP, BN], dtype=tl.float32)
    for i in range(0, num_parts, BP):
        m_tile = (i + b_p < num_parts)[:, None] & (b_n < N)[None, :]
        b_sum += tl.load(parts + (i + b_p).to(tl.int64)[:, None] * N + b_n[None, :], mask=m_tile, other=0.0)
    p_out = out + (b_n % COLUMNS * (N // COLUMNS) + b_n // COLUMNS if TRANSPOSE else b_n)
    tl.store(p_out, tl.sum(b_sum, axis=0).to(out.dtype.element_ty), mask=b_n < N)


def sum_parts(parts: torch.Tensor, dtype: torch.dtype, transpose: bool = False) -> torch.Tensor:
    """float32 parts [P, ...] to their sum [...], in a fixed order; of [P, A, B] also to [B, A]."""
    out = torch.empty(parts.shape[:0:-1] if transpose else parts.shape[1:], dtype=dtype, device=parts.device)
    BP, BN = PARTS_TILE
    _sum_parts_kernel[(triton.cdiv(out.numel(), BN),)](
        parts=parts,
        out=out,
        num_parts=parts.shape[0],
        N=out.numel(),
        COLUMNS=parts.shape[-1],
        TRANSPOSE=transpose,
        BP=BP,
        BN=BN,
        num_warps=8,
    )
    return out
