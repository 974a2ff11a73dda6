"""Which elements of a tile exist, for every kernel family."""

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
