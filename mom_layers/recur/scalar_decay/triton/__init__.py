"""The general kernel set: Triton kernels for every chip, type and head size."""

from mom_layers.recur.scalar_decay.triton.decay_gradient import decay_gradient
from mom_layers.recur.scalar_decay.triton.decays import chunk_decays
from mom_layers.recur.scalar_decay.triton.launches import launches_for
from mom_layers.recur.scalar_decay.triton.part_states import part_states
from mom_layers.recur.scalar_decay.triton.walk import walk

__all__ = ["NAME", "chunk_decays", "decay_gradient", "launches_for", "part_states", "takes", "walk"]

NAME = "general"


def takes(chip, dtype, k_dim, v_dim) -> bool:
    """Always: `launches` chooses the tiles by the chip's shared memory."""
    return True
