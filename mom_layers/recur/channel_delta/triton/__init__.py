"""The general kernel set: Triton kernels for every chip, type and head size."""

from mom_layers.recur.channel_delta.triton.chunk_local import chunk_local
from mom_layers.recur.channel_delta.triton.chunk_states import chunk_states
from mom_layers.recur.channel_delta.triton.recurrence import recurrence
from mom_layers.recur.channel_delta.triton.reverse_recurrence import reverse_recurrence
from mom_layers.recur.channel_delta.triton.row_gradients import row_gradients
from mom_layers.recur.channel_delta.triton.score_gradients import score_gradients

__all__ = [
    "NAME", "chunk_local", "chunk_states", "recurrence", "reverse_recurrence", "row_gradients", "score_gradients",
    "takes",
]  # fmt: skip

NAME = "general"


def takes(chip, dtype, k_dim, v_dim) -> bool:
    """Always: `launches` chooses the tiles by the chip's shared memory."""
    return True
