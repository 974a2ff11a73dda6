"""Tiles, warps and pipeline stages for Blackwell's 227 KB of shared memory, and 256 KB of tensor memory for sums."""

from __future__ import annotations

import torch

from mom_layers.common.chips import cached_choice
from mom_layers.recur.scalar_decay.triton.launches import Launch, Launches, Table

# The state's rows in one block: for two, Triton 3.6 fails to place the sums in tensor memory. Chosen from what the
# compiler reports for sm_100 (products, registers, spills); not tuned.
TABLE = Table(
    name="Blackwell tiles",
    shared_memory=220 * 1024,
    walk={256: Launch(64, 8, 2), 128: Launch(64, 8, 3), 64: Launch(64, 4, 3)},
    walk_with_terms={256: Launch(64, 8, 2), 128: Launch(64, 8, 3), 64: Launch(64, 4, 3)},
    part_states={256: Launch(128, 8, 3), 128: Launch(128, 8, 3), 64: Launch(64, 4, 3)},
    decay_gradient=Launch(64, 4, 3),
)


@cached_choice
def launches_for(device: torch.device, dtype: torch.dtype, a_dim: int, c_dim: int) -> Launches:
    """The launches for A and C."""
    return TABLE.launches(a_dim, c_dim)
