"""Tiles, warps and pipeline stages for Blackwell's 227 KB of shared memory, and 256 KB of tensor memory for sums."""

from __future__ import annotations

import torch

from mom_layers.common.chips import cached_choice
from mom_layers.recur.scalar_delta.triton.launches import Launch, Launches, Table

# A product runs in tensor memory where its left operand has 64 rows or more: so many rows of the state has a program of
# the state gradients. Chosen from what the compiler reports for sm_100 (products, registers, spills); not tuned.
TABLE = Table(
    name="Blackwell tiles",
    shared_memory=165668,
    recurrence={256: Launch(32, 8, 2), 128: Launch(64, 8, 2), 64: Launch(64, 4, 2)},
    state_gradients={256: Launch(64, 8, 1), 128: Launch(64, 8, 1), 64: Launch(64, 8, 1)},
    chunk_scores=Launch(64, 4, 3),
    score_gradients=Launch(256, 8, 1),
    query_key_gradients=Launch(64, 4, 3),
)


@cached_choice
def launches_for(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> Launches:
    """The launches for head sizes K and V."""
    return TABLE.launches(k_dim, v_dim)
