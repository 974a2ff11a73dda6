"""Sums in Triton: of a tile inside a kernel, and of the partial sums of programs, without atomics: the order is fixed.

Shape legend: P parts. Tiles are BP parts by BN columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sum_of_vector(b_x):
    """The sum [1] of [BT], by a reduction of two dimensions.

    For Blackwell, Triton 3.6 and 3.7 fail where a vector that follows from a matrix product is reduced as a vector
    ("parent layout must have at least rank >= 2").
    """
    return tl.sum(b_x[:, None], 0)


TILE = (256, 32)  # BP and BN; not tuned


@triton.jit(do_not_specialize=["num_parts"])
def _sum_parts_kernel(
    parts, out, num_parts, N: tl.constexpr, COLUMNS: tl.constexpr, TRANSPOSE: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out[n] = sum over p of parts[p, n]; with TRANSPOSE the sum [N / COLUMNS, COLUMNS] is stored transposed."""
    b_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_p = tl.arange(0, BP)
    # Each of BP rows of the tile adds up every BP-th part; the sum over the tile comes last.
    b_sum = tl.zeros([BP, BN], dtype=tl.float32)
    for i in range(0, num_parts, BP):
        m_tile = (i + b_p < num_parts)[:, None] & (b_n < N)[None, :]
        b_sum += tl.load(parts + (i + b_p).to(tl.int64)[:, None] * N + b_n[None, :], mask=m_tile, other=0.0)
    # Column n of the parts is (n // COLUMNS, n % COLUMNS) of the sum.
    p_out = out + (b_n % COLUMNS * (N // COLUMNS) + b_n // COLUMNS if TRANSPOSE else b_n)
    tl.store(p_out, tl.sum(b_sum, axis=0).to(out.dtype.element_ty), mask=b_n < N)


def sum_parts(parts: torch.Tensor, dtype: torch.dtype, transpose: bool = False) -> torch.Tensor:
    """Adds up partial sums.

    Args:
        parts: [P, ...] float32, contiguous.
        dtype: of the result.
        transpose: transpose the sum of [P, A, B].

    Returns:
        the sum [...] over P, or [B, A] with ``transpose``.
    """
    out = torch.empty(parts.shape[:0:-1] if transpose else parts.shape[1:], dtype=dtype, device=parts.device)
    BP, BN = TILE
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
