"""The general kernel set: Triton kernels for every chip, type and head size."""

from mom_layers.recur.channel_decay.triton.chunk_local import chunk_local
from mom_layers.recur.channel_decay.triton.local_gradients import local_gradients
from mom_layers.recur.channel_decay.triton.recurrence import recurrence
from mom_layers.recur.channel_decay.triton.reverse_recurrence import reverse_recurrence
from mom_layers.recur.channel_decay.triton.state_gradients import state_gradients

__all__ = ["NAME", "chunk_local", "local_gradients", "recurrence", "reverse_recurrence", "state_gradients", "takes"]

NAME = "general"


def takes(chip, dtype, k_dim, v_dim) -> bool:
    """Always: `launches` chooses the tiles by the chip's shared memory."""
    return True
