"""What kernels of every family do with tiles."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_mask(m_row, o_column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, columns of a tile], from which of its rows exist and the numbers of its columns, of which there are
    COLUMNS; WIDTH is that of all tiles."""
    if COLUMNS == WIDTH:
        return m_row[:, None]
    else:
        return m_row[:, None] & (o_column < COLUMNS)[None, :]


@triton.jit
def finished(b_sum, i):
    """b_sum, for i of 0 and more: in a loop over i its products have ended here.

    Triton 3.6 keeps rows that a product and other instructions read in one place of shared memory, and loads the next
    rows to that place while an asynchronous product may still read.
    """
    return tl.where(i >= 0, b_sum, 0.0)
