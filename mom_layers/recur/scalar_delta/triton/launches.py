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
        chunk_scores: columns of K that the loop takes at a time.
        recurrence: columns of the state that a program of either recurrence holds.
        state_gradients: rows of the state that a program holds.
        score_gradients: columns of V that the loop takes at a time.
        query_key_gradients: columns of K, and then of V, that the loops take at a time.
    """

    chunk_scores: Launch
    recurrence: Launch
    state_gradients: Launch
    score_gradients: Launch
    query_key_gradients: Launch


@dataclass(frozen=True)
class Table:
    """Launches for every K and V.

    Attributes:
        name: for the log.
        shared_memory: bytes that its largest kernel takes, as compiled for sm_80 and sm_90.
        recurrence: by K, which decides how much of the state [K, tile] is; K below 64 runs as 64 does.
        state_gradients: by V, in the same way.
        chunk_scores, score_gradients, query_key_gradients: for every size.
    """

    name: str
    shared_memory: int
    recurrence: dict[int, Launch]
    state_gradients: dict[int, Launch]
    chunk_scores: Launch
    score_gradients: Launch
    query_key_gradients: Launch

    def launches(self, k_dim: int, v_dim: int) -> Launches:
        """The launches for one K and one V, with tiles that are no wider than these."""
        recurrence = self.recurrence[max(64, k_dim)]
        states = self.state_gradients[max(64, v_dim)]
        if k_dim < states.tile:
            states = states._replace(tile=k_dim, num_warps=max(4, states.num_warps * k_dim // states.tile))
        return Launches(
            chunk_scores=self.chunk_scores._replace(tile=min(self.chunk_scores.tile, k_dim)),
            recurrence=recurrence._replace(tile=min(recurrence.tile, v_dim)),
            state_gradients=states,
            score_gradients=self.score_gradients._replace(tile=min(self.score_gradients.tile, v_dim)),
            query_key_gradients=self.query_key_gradients,
        )


# For 16-bit inputs, from the widest tiles to the narrowest: a chip runs the first table that its shared memory holds.
TABLES = (
    # H100 and H200 run this table for K or V below 64. Chosen from what the compiler reports for sm_90 (registers,
    # spills, shared memory); not tuned.
    Table(
        name="wide tiles",
        shared_memory=189184,
        recurrence={256: Launch(32, 8, 2), 128: Launch(64, 4, 2), 64: Launch(64, 4, 2)},
        # Not 64 rows by 4 warps in one stage: with V below 64, Triton 3.6 then makes code for Hopper that gives wrong
        # gradients or reads outside the tensors, as seen on an H100. 8 warps, 2 stages or 32 rows are right there.
        state_gradients={256: Launch(32, 4, 1), 128: Launch(64, 8, 1), 64: Launch(64, 8, 1)},
        chunk_scores=Launch(64, 4, 3),
        score_gradients=Launch(256, 8, 1),
        query_key_gradients=Launch(64, 4, 3),
    ),
    # For the 163 KB of an A100, where both operands of a product pass through registers: narrower tiles or more warps,
    # and late loads. Chosen from what the compiler reports for sm_80 and sm_86; not tuned.
    Table(
        name="narrow tiles",
        shared_memory=103168,
        recurrence={256: Launch(32, 8, 2), 128: Launch(32, 4, 2), 64: Launch(32, 4, 2)},
        state_gradients={256: Launch(16, 4, 1, True), 128: Launch(32, 8, 1, True), 64: Launch(32, 8, 1, True)},
        chunk_scores=Launch(64, 4, 3),
        score_gradients=Launch(64, 8, 1),
        query_key_gradients=Launch(32, 4, 2),
    ),
    # For the 99 KB of smaller cards (capabilities 8.6, 8.9 and 12.0): a narrower state, which spills nothing there.
    # Chosen from what the compiler reports for sm_86; not tuned.
    Table(
        name="narrowest tiles",
        shared_memory=92928,
        recurrence={256: Launch(16, 8, 2), 128: Launch(32, 4, 2), 64: Launch(32, 4, 2)},
        state_gradients={256: Launch(16, 4, 1, True), 128: Launch(32, 8, 1, True), 64: Launch(32, 8, 1, True)},
        chunk_scores=Launch(64, 4, 3),
        score_gradients=Launch(64, 8, 1),
        query_key_gradients=Launch(32, 4, 2),
    ),
    # For the 64 KB of an MI300X. Chosen from what the compiler reports for gfx942; not tuned.
    Table(
        name="tiles for 64 KB",
        shared_memory=65536,
        recurrence={256: Launch(16, 8, 1, True), 128: Launch(32, 4, 2), 64: Launch(32, 4, 2)},
        state_gradients={256: Launch(16, 4, 1, True), 128: Launch(32, 8, 1, True), 64: Launch(32, 8, 1, True)},
        chunk_scores=Launch(64, 4, 3),
        score_gradients=Launch(64, 8, 1),
        query_key_gradients=Launch(32, 4, 2),
    ),
)
# For float32 inputs, whose exact products run outside the tensor cores, for comparisons: the tiles that spill least by
# the compiler's report; not tuned. With late loads, 256 columns of k, or of e, y and do, fit 99 KB.
FLOAT32_TABLES = (
    Table(
        name="float32",
        shared_memory=151552,
        recurrence={256: Launch(16, 8, 1), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        state_gradients={256: Launch(16, 8, 1), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        chunk_scores=Launch(32, 8, 1),
        score_gradients=Launch(32, 8, 1),
        query_key_gradients=Launch(32, 8, 1),
    ),
    Table(
        name="float32, late loads",
        shared_memory=90112,
        recurrence={256: Launch(16, 8, 1, True), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        state_gradients={256: Launch(16, 8, 1, True), 128: Launch(16, 8, 1), 64: Launch(16, 8, 1)},
        chunk_scores=Launch(32, 8, 1),
        score_gradients=Launch(32, 8, 1),
        query_key_gradients=Launch(32, 8, 1),
    ),
)


@cached_choice
def table_for(chip: Chip, dtype: torch.dtype) -> Table:
    """The widest tiles for a type whose shared memory a chip has."""
    return widest_that_fits("gated delta rule", FLOAT32_TABLES if dtype == torch.float32 else TABLES, chip)


@cached_choice
def launches_for(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> Launches:
    """The general set's launches on a device, for inputs of a type and head sizes K and V."""
    return table_for(chip_of(device), dtype).launches(k_dim, v_dim)
