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
        tile: columns (or rows) that a program holds, or that a loop takes at a time.
        num_warps: warps of a program.
        num_stages: of the compiler's pipeline over a loop.
        late: wide rows are loaded just before the product that reads them, some of them twice, so that shared memory
            and registers hold fewer at a time. Only recurrences and state gradients read this.
    """

    tile: int
    num_warps: int
    num_stages: int
    late: bool = False


@dataclass(frozen=True)
class Launches:
    """The launches for one K and one V.

    Attributes:
        chunk_local, block_scores: columns of K that the loop takes at a time.
        recurrence: columns of the state that a program of either recurrence holds.
        state_gradients: rows of the state that a program holds.
        score_gradients: columns of V that the loop takes at a time.
        row_gradients, block_gradients: columns of K that a program computes.
    """

    chunk_local: Launch
    block_scores: Launch
    recurrence: Launch
    state_gradients: Launch
    score_gradients: Launch
    row_gradients: Launch
    block_gradients: Launch


# Programs of a recurrence that run at once where each takes a whole multiprocessor of an H100 or H200.
FEW_PROGRAMS = 132


def for_states(launch: Launch, v_dim: int, num_states: int) -> Launch:
    """The launch of either recurrence for a number of states, one a segment and head: few states get narrower tiles, so
    that more programs run."""
    tile = launch.tile
    while tile > 16 and 2 * num_states * (v_dim // tile) <= FEW_PROGRAMS:
        tile //= 2
    return launch._replace(tile=tile)


@dataclass(frozen=True)
class Table:
    """Launches for every K and V.

    Attributes:
        name: for the log.
        shared_memory: bytes that a chip must have to run this table.
        recurrence: by K, which decides how large the state [K, tile] is; K below 64 runs as 64 does.
        state_gradients: by V, in the same way.
        the other launches: for every size.
    """

    name: str
    shared_memory: int
    recurrence: dict[int, Launch]
    state_gradients: dict[int, Launch]
    chunk_local: Launch
    block_scores: Launch
    score_gradients: Launch
    row_gradients: Launch
    block_gradients: Launch

    def launches(self, k_dim: int, v_dim: int) -> Launches:
        """The launches for one K and one V, with tiles that are no wider than these."""

        def fit(launch: Launch, size: int) -> Launch:
            return launch._replace(tile=min(launch.tile, size))

        return Launches(
            chunk_local=fit(self.chunk_local, k_dim),
            block_scores=fit(self.block_scores, k_dim),
            recurrence=fit(self.recurrence[max(64, k_dim)], v_dim),
            state_gradients=fit(self.state_gradients[max(64, v_dim)], k_dim),
            score_gradients=fit(self.score_gradients, v_dim),
            row_gradients=fit(self.row_gradients, k_dim),
            block_gradients=fit(self.block_gradients, k_dim),
        )


# For 16-bit inputs, from the widest tiles to the narrowest: a chip runs the first table that its shared memory holds.
TABLES = (
    # K = V = 256: the fastest of a few on an H200, chunk_local and row_gradients on an H100. Other sizes: chosen from
    # what the compiler reports (registers, spills, shared memory); not tuned. Triton keeps the operands of both stages
    # of a pipeline in shared memory for Hopper and Blackwell.
    Table(
        name="wide tiles",
        shared_memory=196 * 1024,
        recurrence={256: Launch(64, 8, 2), 128: Launch(64, 8, 2), 64: Launch(64, 4, 2)},
        state_gradients={256: Launch(64, 8, 1), 128: Launch(32, 4, 1), 64: Launch(32, 4, 1)},
        chunk_local=Launch(32, 2, 1),
        block_scores=Launch(32, 1, 1),
        score_gradients=Launch(64, 4, 2),
        row_gradients=Launch(32, 4, 1),
        block_gradients=Launch(32, 2, 1),
    ),
    # For the 163 KB of an A100, where both operands of a product pass through registers: a state half as wide, and late
    # loads, which spill a tenth. Chosen from what the compiler reports for sm_80; not tuned.
    Table(
        name="medium tiles",
        shared_memory=160 * 1024,
        recurrence={256: Launch(32, 8, 2), 128: Launch(64, 8, 2), 64: Launch(64, 4, 2)},
        state_gradients={256: Launch(64, 8, 1, True), 128: Launch(32, 4, 1, True), 64: Launch(32, 4, 1, True)},
        chunk_local=Launch(32, 2, 1),
        block_scores=Launch(32, 1, 1),
        score_gradients=Launch(64, 4, 2),
        row_gradients=Launch(32, 4, 1),
        block_gradients=Launch(32, 2, 1),
    ),
    # For less shared memory: a recurrence with one stage. Chosen from what the compiler reports for K = V on sm_86,
    # sm_89 and sm_90; not tuned.
    Table(
        name="narrow tiles",
        shared_memory=96 * 1024,
        recurrence={256: Launch(16, 8, 1), 128: Launch(64, 8, 1), 64: Launch(64, 4, 2)},
        state_gradients={256: Launch(64, 8, 1, True), 128: Launch(32, 4, 1, True), 64: Launch(32, 4, 1, True)},
        chunk_local=Launch(32, 2, 1),
        block_scores=Launch(32, 1, 1),
        score_gradients=Launch(64, 4, 2),
        row_gradients=Launch(32, 4, 1),
        block_gradients=Launch(32, 2, 1),
    ),
)
# For float32 inputs, whose exact products run outside the tensor cores, for comparisons; not tuned. With late loads,
# 256 columns of q and k, or of v and do, fit 99 KB.
FLOAT32_TABLES = (
    Table(
        name="float32",
        shared_memory=148 * 1024,
        recurrence={256: Launch(16, 16, 1), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        state_gradients={256: Launch(16, 16, 1), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        chunk_local=Launch(32, 8, 1),
        block_scores=Launch(32, 4, 1),
        score_gradients=Launch(32, 8, 1),
        row_gradients=Launch(32, 8, 1),
        block_gradients=Launch(32, 8, 1),
    ),
    Table(
        name="float32, late loads",
        shared_memory=84 * 1024,
        recurrence={256: Launch(16, 16, 1, True), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        state_gradients={256: Launch(16, 16, 1, True), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        chunk_local=Launch(32, 8, 1),
        block_scores=Launch(32, 4, 1),
        score_gradients=Launch(32, 8, 1),
        row_gradients=Launch(32, 8, 1),
        block_gradients=Launch(32, 8, 1),
    ),
)


@cached_choice
def table_for(chip: Chip, dtype: torch.dtype) -> Table:
    """The widest tiles for a type whose shared memory a chip has."""
    return widest_that_fits("gated linear attention", FLOAT32_TABLES if dtype == torch.float32 else TABLES, chip)


@cached_choice
def launches_for(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> Launches:
    """The general set's launches on a device, for inputs of a type and head sizes K and V."""
    return table_for(chip_of(device), dtype).launches(k_dim, v_dim)
