"""Head sizes at which the kernels were found wrong on a GPU."""

from __future__ import annotations

FEWEST_COLUMNS = 64
"""Columns of a tile of the walk from which products of 64 and more rows were right."""


def gpu_fault(k_dim: int, v_dim: int) -> str | None:
    """What tests on an H200 found at a key size (after the feature map) and a value size, with Triton 3.6 and 16-bit
    inputs: None where the results were right.

    Where the walk takes all rows of a state of 64 to 128 rows at once, and tiles of fewer than 64 columns, its results
    are wrong on Hopper, although they are right in Triton's interpreter.
    """
    for rows, columns in ((k_dim, v_dim), (v_dim, k_dim)):
        if 32 < rows <= 128 and columns % FEWEST_COLUMNS:
            return f"wrong results on an H200 with {rows} rows of a state and {columns} columns"
    return None
