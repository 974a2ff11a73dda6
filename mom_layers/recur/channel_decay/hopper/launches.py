"""Tiles and warps of Hopper's kernels, for its 227 KB of shared memory and 132 multiprocessors."""

from __future__ import annotations

from typing import NamedTuple

# The programs that run at once where each takes a whole multiprocessor: an H100 or H200 has as many.
FEW_PROGRAMS = 132


class Launch(NamedTuple):
    """tile: columns or rows that a program holds. stages: of a recurrence, the chunks whose rows of q~ or k~, the left
    operand of the product with the state, have a place in shared memory at the same time; 1 for other kernels."""

    tile: int
    num_warps: int
    stages: int = 1


# By K, the fastest of a few that were timed on an H100. For 256 the widest state that fits the registers, with tiles
# that fit the shared memory; below that, two programs share a multiprocessor, and one waits while the other multiplies.
RECURRENCE = {256: Launch(128, 8), 128: Launch(64, 4), 64: Launch(64, 4)}


def recurrence_launch(k_dim: int, v_dim: int, num_states: int) -> Launch:
    """The launch of either recurrence, for a number of states (one a segment and head).

    Few states get narrower tiles, so that more programs run. The narrowest were faster with four warps than with eight.
    """
    tile, num_warps, stages = RECURRENCE[k_dim]
    tile = min(tile, v_dim)
    while tile > 32 and num_states * (v_dim // tile) <= FEW_PROGRAMS:
        tile //= 2
    return Launch(tile, 4, 2) if tile <= 32 else Launch(tile, num_warps, stages)


# Rows of the states that a program holds, by V: SPAN places of the state and two of v or do fill the shared memory. For
# 128 the fastest of three on an H100.
STATE_GRADIENTS = {256: Launch(64, 8), 128: Launch(128, 8), 64: Launch(64, 4)}


def state_gradients_launch(k_dim: int, v_dim: int) -> Launch:
    """The launch of the state gradients for one K and one V."""
    launch = STATE_GRADIENTS[v_dim]
    return launch._replace(tile=min(launch.tile, k_dim))


# Columns of K that a program computes. Not tuned.
ROW_GRADIENTS = Launch(64, 8)
