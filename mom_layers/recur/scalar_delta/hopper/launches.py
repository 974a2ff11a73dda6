"""Tiles, warps and registers of Hopper's kernels, for its 227 KB of shared memory and 132 multiprocessors."""

from __future__ import annotations

import functools
from typing import NamedTuple

# The programs that run at once where each takes a whole multiprocessor: an H100 or H200 has as many.
FEW_PROGRAMS = 132


class Launch(NamedTuple):
    """tile: columns or rows that a program holds, or that a loop takes at a time. registers: the most that a thread may
    use, None for the compiler's choice."""

    tile: int
    num_warps: int
    registers: int | None = None


# Columns of the state that a program of either recurrence holds, by K: the fastest of a few that were timed on an H200.
# For 256 the widest state that fits the registers, with tiles that fit the shared memory; below that, two programs
# share a multiprocessor, and one waits while the other multiplies.
RECURRENCE = {256: Launch(128, 8), 128: Launch(64, 4), 64: Launch(64, 4)}
# Rows of the state that a program holds, by V. Chosen from what the compiler reports (registers, spills, shared
# memory); not tuned.
STATE_GRADIENTS = {256: Launch(128, 8), 128: Launch(64, 4), 64: Launch(64, 4)}
# Columns of dq and dk that the loop takes at a time, by the larger of K and V. The limit of registers lets two programs
# share a multiprocessor. Chosen from what the compiler reports; not tuned.
LOCAL_GRADIENTS = {256: Launch(64, 8, 128), 128: Launch(64, 8, 128), 64: Launch(64, 4)}


def recurrence_launch(k_dim: int, v_dim: int, num_states: int) -> Launch:
    """The launch of either recurrence, for a number of states (one a segment and head).

    Few states get narrower tiles, so that more programs run.
    """
    tile, num_warps, _ = RECURRENCE[k_dim]
    tile = min(tile, v_dim)
    while tile > 32 and num_states * (v_dim // tile) <= FEW_PROGRAMS:
        tile //= 2
    return Launch(tile, num_warps)


def recurrence_stages(tile: int) -> int:
    """2 where the tiles are narrow enough for the next chunk to be fetched while this one is computed, else 1."""
    return 2 if tile <= 32 else 1


@functools.cache
def state_gradients_launch(k_dim: int, v_dim: int) -> Launch:
    """The launch of the state gradients for one K and one V."""
    launch = STATE_GRADIENTS[v_dim]
    if k_dim < launch.tile:
        launch = Launch(k_dim, max(4, launch.num_warps * k_dim // launch.tile))
    return launch
