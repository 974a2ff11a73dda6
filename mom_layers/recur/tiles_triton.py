"""What kernels of every family do with tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.chips import chip_of


def has_asynchronous_products(device: torch.device) -> bool:
    """Whether products of 16-bit inputs go on beside a warp's next instructions, as Hopper's wgmma does.

    Blackwell's products do too, but in tensor memory, of whose accumulators Triton 3.6 compiles no selection.
    """
    chip = chip_of(device)
    return chip.vendor == "nvidia" and chip.capability[0] == 9


@triton.jit
def tile_mask(m_row, o_column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, columns of a tile], from which of its rows exist and the numbers of its columns, of which there are
    COLUMNS; WIDTH is that of all tiles."""
    if COLUMNS == WIDTH:
        return m_row[:, None]
    else:
        return m_row[:, None] & (o_column < COLUMNS)[None, :]


@triton.jit
def finished(b_sum, i, ASYNCHRONOUS: tl.constexpr):
    """b_sum, for i of 0 and more: in a loop over i its products have ended here, where products are ASYNCHRONOUS.

    Triton 3.6 keeps rows that a product and other instructions read in one place of shared memory, and loads the next
    rows to that place while an asynchronous product may still read.
    """
    if ASYNCHRONOUS:
        b_sum = tl.where(i >= 0, b_sum, 0.0)
    return b_sum
