"""Tiles, warps and pipeline stages of the general set's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mom_layers.common.chips import Chip, cached_choice, chip_of
from mom_layers.recur.kernel_sets import widest_that_fits

# About the number of multiprocessors of an H100.
ENOUGH_PROGRAMS = 128


class Launch(NamedTuple):
    """The tile, warps and pipeline stages of a kernel.

    Attributes:
        tile: columns (or rows) that a program holds, or that a loop takes at a time.
        num_warps: warps of a program.
        num_stages: of the compiler's pipeline over a loop.
        late: wide rows are loaded just before the product that reads them, so that shared memory and registers hold
            fewer at a time. Only recurrences read this.
        loop_tile: columns that the loop of a program takes at a time. Only row gradients read this.
        narrowest: columns of a tile at least. The last tile of recurrences and row gradients may reach past the head.
    """

    tile: int
    num_warps: int
    num_stages: int
    late: bool = False
    loop_tile: int = 64
    narrowest: int = 16

    def for_columns(self, heads: int, v_dim: int) -> Launch:
        """A recurrence's launch with a narrower tile where ``heads`` states, of all segments, make too few programs."""
        tile = self.tile
        while tile > max(32, self.narrowest) and heads * -(-v_dim // tile) < ENOUGH_PROGRAMS:
            tile //= 2
        return self._replace(tile=tile)


@dataclass(frozen=True)
class Launches:
    """The launches for one K and one V.

    Attributes:
        chunk_local: columns of K that the loop takes at a time.
        levels: of the kernels that compute the chunks anew that are not whole on the first level.
        recurrence: columns of the state that a program of either recurrence holds.
        chunk_states: rows and columns of the state that a program holds.
        score_gradients: columns of V that the loop takes at a time.
        row_gradients: columns of K that a program computes, and columns of V that the loop takes at a time.
    """

    chunk_local: Launch
    levels: Launch
    recurrence: Launch
    chunk_states: Launch
    score_gradients: Launch
    row_gradients: Launch


@dataclass(frozen=True)
class Table:
    """Launches for every K and V.

    Attributes:
        name: for the log.
        shared_memory: bytes that its largest kernel takes, as compiled for the chips that run the table.
        recurrence: by K, which decides how large the state [K, tile] is; K below 64 runs as 64 does.
        chunk_local, levels, chunk_states, score_gradients, row_gradients: for every size.
    """

    name: str
    shared_memory: int
    recurrence: dict[int, Launch]
    chunk_local: Launch
    levels: Launch
    chunk_states: Launch
    score_gradients: Launch
    row_gradients: Launch

    def launches(self, k_dim: int, v_dim: int) -> Launches:
        """The launches for one K and one V, with tiles that are no wider than these where they may be so narrow."""

        def fit(launch: Launch, size: int) -> Launch:
            return launch._replace(tile=min(launch.tile, max(size, launch.narrowest)))

        return Launches(
            chunk_local=fit(self.chunk_local, k_dim),
            levels=fit(self.levels, k_dim),
            recurrence=fit(self.recurrence[max(64, k_dim)], v_dim),
            chunk_states=self.chunk_states,
            score_gradients=fit(self.score_gradients, v_dim),
            row_gradients=fit(self.row_gradients, k_dim),
        )


# For 16-bit inputs, from the widest tiles to the narrowest: a chip runs the first table that its shared memory holds.
TABLES = (
    # For Hopper and Blackwell. Chosen from what the compiler reports for sm_90 (registers, spills, shared memory); not
    # tuned. 256 columns of q~, k~ and E~ take 96 KB, so that a recurrence over them has one stage. Where a stage is all
    # there is, and for row gradients, narrower tiles than 64 columns would give operands of products another swizzle
    # than their place in shared memory had before: there ptxas of CUDA 12.8 takes an address from a register that holds
    # something else (`tests/mom_layers/undefined_registers.py`).
    Table(
        name="wide tiles",
        shared_memory=176 * 1024,
        recurrence={256: Launch(64, 8, 1, narrowest=64), 128: Launch(64, 8, 2), 64: Launch(64, 4, 2)},
        chunk_local=Launch(32, 4, 1),
        levels=Launch(64, 8, 1),
        chunk_states=Launch(64, 4, 2),
        score_gradients=Launch(64, 4, 2),
        row_gradients=Launch(64, 8, 2, narrowest=64),
    ),
    # For less shared memory. Chosen from what the compiler reports for sm_80 and sm_86; not tuned.
    Table(
        name="narrow tiles",
        shared_memory=48 * 1024,
        recurrence={256: Launch(16, 8, 1, True), 128: Launch(32, 4, 1), 64: Launch(32, 4, 1)},
        chunk_local=Launch(32, 4, 1),
        levels=Launch(32, 8, 1, loop_tile=32),
        chunk_states=Launch(64, 4, 1),
        score_gradients=Launch(64, 4, 1),
        row_gradients=Launch(32, 4, 1, loop_tile=32),
    ),
)
# For float32 inputs, whose exact products run outside the tensor cores, for comparisons; not tuned.
FLOAT32_TABLES = (
    Table(
        name="float32",
        shared_memory=86016,
        recurrence={256: Launch(16, 16, 1, True), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        chunk_local=Launch(32, 8, 1),
        levels=Launch(32, 8, 1, loop_tile=32),
        chunk_states=Launch(32, 8, 1),
        score_gradients=Launch(32, 8, 1),
        row_gradients=Launch(32, 8, 1, loop_tile=32),
    ),
)


@cached_choice
def table_for(chip: Chip, dtype: torch.dtype) -> Table:
    """The widest tiles for a type whose shared memory a chip has."""
    return widest_that_fits("channel delta rule", FLOAT32_TABLES if dtype == torch.float32 else TABLES, chip)


@cached_choice
def launches_for(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> Launches:
    """The general set's launches on a device, for inputs of a type and head sizes K and V."""
    return table_for(chip_of(device), dtype).launches(k_dim, v_dim)
