"""Tiles, warps and pipeline stages of the general set's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from mom_layers.common.chips import Chip, cached_choice, chip_of
from mom_layers.recur.kernel_sets import widest_that_fits


class Launch(NamedTuple):
    """tile: columns that a program holds, or that a loop takes at a time; warps of a program; pipeline stages."""

    tile: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Launches:
    """The launches for one size A of the rows that are multiplied with the state, and one size C of its columns.

    Attributes:
        walk, part_states: columns of the state that a program holds.
        decay_gradient: columns that the loops take at a time.
    """

    walk: Launch
    part_states: Launch
    decay_gradient: Launch


@dataclass(frozen=True)
class Table:
    """Launches for every A and C.

    Attributes:
        name: for the log.
        shared_memory: bytes that a chip must have to run this table.
        walk, part_states: by A as a power of two, which decides how large the state [A, tile] is; an A below 64 runs as
            64 does.
        decay_gradient: for every size.
    """

    name: str
    shared_memory: int
    walk: dict[int, Launch]
    part_states: dict[int, Launch]
    decay_gradient: Launch

    def launches(self, a_dim: int, c_dim: int) -> Launches:
        """The launches for one A and one C, with tiles that divide C."""

        def fit(launch: Launch) -> Launch:
            tile = launch.tile
            while c_dim % tile:
                tile //= 2
            return launch._replace(tile=tile)

        size = next(size for size in (64, 128, 256) if a_dim <= size)
        return Launches(fit(self.walk[size]), fit(self.part_states[size]), self.decay_gradient)


TABLES = (
    Table(
        name="wide tiles",
        shared_memory=190 * 1024,
        walk={256: Launch(64, 8, 2), 128: Launch(64, 4, 2), 64: Launch(64, 4, 2)},
        part_states={256: Launch(128, 8, 3), 128: Launch(128, 8, 3), 64: Launch(64, 4, 3)},
        decay_gradient=Launch(64, 4, 3),
    ),
)
FLOAT32_TABLES = (
    Table(
        name="float32",
        shared_memory=148 * 1024,
        walk={256: Launch(16, 16, 1), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
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
