"""Triton kernel that reads rows from several buffers by index: on GPUs, from the memory of other GPUs.

Shape legend: ranks E, channels C, choices of an output row k. A program writes one output row, BC channels of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024  # BC at most; not tuned


@triton.jit(do_not_specialize=["num_rows"])
def _pull_kernel(
    pointers, wanted, out, num_rows, STRIDE: tl.constexpr, FIRST: tl.constexpr, C: tl.constexpr,
    CHOICES: tl.constexpr, BC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """out[r] = sum over i of row wanted[r, i] % num_rows of buffer wanted[r, i] // num_rows; nothing for -1."""
    i_out = tl.program_id(0).to(tl.int64)
    b_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = b_c < C
    b_sum = tl.zeros([BC], tl.float32)
    for i in tl.static_range(CHOICES):
        i_wanted = tl.load(wanted + i_out * CHOICES + i)
        present = i_wanted >= 0
        i_wanted = tl.maximum(i_wanted, 0)
        address = tl.load(pointers + i_wanted // num_rows)
        p_buffer = address.to(tl.pointer_type(out.dtype.element_ty))
        if ALIGNED:  # the compiler knows nothing of an address that was loaded; so it reads in vectors of 16 bytes
            p_buffer = tl.multiple_of(p_buffer, 16)
        p_row = p_buffer + (i_wanted % num_rows).to(tl.int64) * STRIDE + FIRST
        b_sum += tl.load(p_row + b_c, mask=m_c & present, other=0.0).to(tl.float32)
    tl.store(out + i_out * C + b_c, b_sum.to(out.dtype.element_ty), mask=m_c)


def pull_rows(
    pointers: torch.Tensor, wanted: torch.Tensor, own: torch.Tensor, first: int, channels: int
) -> torch.Tensor:
    """Reads rows of all ranks' buffers.

    Args:
        pointers: [E] int64, the address of every buffer; all have the shape and type of ``own``.
        wanted: [out rows, k] int32 contiguous, rank * rows of a buffer + row; -1 for no row.
        own: [rows, all channels], this rank's buffer.
        first, channels: the columns to read.

    Returns:
        [out rows, channels] in the buffers' type, the sum over k, in float32.
    """
    out = torch.empty(wanted.shape[0], channels, dtype=own.dtype, device=own.device)
    block = min(BLOCK, triton.next_power_of_2(channels))
    size, stride = own.element_size(), own.shape[1]
    _pull_kernel[(wanted.shape[0], triton.cdiv(channels, block))](
        pointers=pointers,
        wanted=wanted,
        out=out,
        num_rows=own.shape[0],
        STRIDE=stride,
        FIRST=first,
        C=channels,
        CHOICES=wanted.shape[1],
        BC=block,
        ALIGNED=stride * size % 16 == 0 and first * size % 16 == 0,
        num_warps=4,
    )
    return out
