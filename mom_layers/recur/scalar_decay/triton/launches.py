"""Tiles, warps and pipeline stages of the general set's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mom_layers.common.chips import Chip, cached_choice, chip_of
from mom_layers.recur.kernel_sets import widest_that_fits


class Launch(NamedTuple):
    """The tile, warps and pipeline stages of a kernel.

    Attributes:
        tile: columns that a program holds, or that a loop takes at a time.
        num_warps: warps of a program.
        num_stages: of the compiler's pipeline over a loop.
        blocks: 1 or 2, the blocks of the state's rows that a loop takes one after another: with 2, shared memory holds
            half as much for each stage. Only the walk reads this.
    """

    tile: int
    num_warps: int
    num_stages: int
    blocks: int = 1


@dataclass(frozen=True)
class Launches:
    """The launches for one size A of the rows that are multiplied with the state, and one size C of its columns.

    Attributes:
        walk, walk_with_terms, part_states: columns of the state that a program holds; the second is for the walks that
            store sums for a decay's gradient.
        decay_gradient: columns that the loops take at a time.
    """

    walk: Launch
    walk_with_terms: Launch
    part_states: Launch
    decay_gradient: Launch


@dataclass(frozen=True)
class Table:
    """Launches for every A and C.

    Attributes:
        name: for the log.
        shared_memory: bytes that a chip must have to run this table.
        walk, walk_with_terms, part_states: by A as a power of two, which decides how large the state [A, tile] is; an A
            below 64 runs as 64 does.
        decay_gradient: for every size.
        narrowest: columns of a tile at least; the last tile may reach past C.
    """

    name: str
    shared_memory: int
    walk: dict[int, Launch]
    walk_with_terms: dict[int, Launch]
    part_states: dict[int, Launch]
    decay_gradient: Launch
    narrowest: int = 16

    def launches(self, a_dim: int, c_dim: int) -> Launches:
        """The launches for one A and one C, with tiles that divide C where they are not the narrowest."""

        def fit(launch: Launch) -> Launch:
            tile = launch.tile
            while c_dim % tile and tile > self.narrowest:
                tile //= 2
            return launch._replace(tile=tile)

        size = next(size for size in (64, 128, 256) if a_dim <= size)
        by_size = (self.walk, self.walk_with_terms, self.part_states)
        return Launches(*(fit(launches[size]) for launches in by_size), self.decay_gradient)


# For 16-bit inputs, from the widest tiles to the narrowest: a chip runs the first table that its shared memory holds.
# Chosen from what the compiler reports (registers, spills, shared memory, and that copies run beside products); not
# tuned.
TABLES = (
    # For Hopper, where products read their operands from shared memory. With narrower tiles ptxas of CUDA 12.8 takes
    # an address of the last product from a register that holds nothing (`tests/mom_layers/undefined_registers.py`).
    Table(
        name="wide tiles",
        shared_memory=186 * 1024,
        walk={256: Launch(64, 8, 3, blocks=2), 128: Launch(128, 8, 3), 64: Launch(64, 4, 3)},
        walk_with_terms={256: Launch(64, 8, 3, blocks=2), 128: Launch(64, 8, 3), 64: Launch(64, 4, 3)},
        part_states={256: Launch(128, 8, 3), 128: Launch(128, 8, 3), 64: Launch(64, 4, 3)},
        decay_gradient=Launch(64, 4, 3),
        narrowest=64,
    ),
    # Where both operands of a product pass through registers, registers decide; fits 99 KB.
    Table(
        name="narrow tiles",
        shared_memory=96 * 1024,
        walk={256: Launch(32, 8, 2, blocks=2), 128: Launch(32, 8, 2), 64: Launch(32, 4, 2)},
        walk_with_terms={256: Launch(32, 8, 2, blocks=2), 128: Launch(32, 8, 2), 64: Launch(32, 4, 2)},
        part_states={256: Launch(64, 8, 2), 128: Launch(64, 8, 2), 64: Launch(64, 4, 2)},
        decay_gradient=Launch(64, 4, 2),
    ),
)
# For float32 inputs, whose exact products run outside the tensor cores, for comparisons; not tuned.
FLOAT32_TABLES = (
    Table(
        name="float32",
        shared_memory=96 * 1024,
        walk={256: Launch(16, 16, 1, blocks=2), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        walk_with_terms={256: Launch(16, 16, 1, blocks=2), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        part_states={256: Launch(16, 16, 1), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        decay_gradient=Launch(32, 8, 1),
    ),
)


@cached_choice
def table_for(chip: Chip, dtype: torch.dtype) -> Table:
    """The widest tiles for a type whose shared memory a chip has."""
    return widest_that_fits("scalar decay", FLOAT32_TABLES if dtype == torch.float32 else TABLES, chip)


@cached_choice
def launches_for(device: torch.device, dtype: torch.dtype, a_dim: int, c_dim: int) -> Launches:
    """The general set's launches on a device, for inputs of a type, A and C."""
    return table_for(chip_of(device), dtype).launches(a_dim, c_dim)
