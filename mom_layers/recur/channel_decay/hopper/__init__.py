"""The kernel set for Hopper (H100, H200): 16-bit inputs and heads of 64 or more.

What a chunk computes from its own rows alone is left to the general set's kernels. The kernels are written in Gluon,
whose names differ between Triton's versions: where the installed version's are not known, the host functions do not
exist.
"""

import torch

from mom_layers.common.triton_versions import gluon_problem
from mom_layers.recur.channel_decay.triton import chunk_local

if gluon_problem() is None:
    from mom_layers.recur.channel_decay.hopper.local_gradients import local_gradients
    from mom_layers.recur.channel_decay.hopper.recurrences import recurrence, reverse_recurrence
    from mom_layers.recur.channel_decay.hopper.state_gradients import state_gradients

__all__ = [
    "NAME", "chunk_local", "local_gradients", "problem", "recurrence", "reverse_recurrence", "state_gradients", "takes",
]  # fmt: skip

NAME = "Hopper"
problem = gluon_problem


def takes(chip, dtype, k_dim, v_dim) -> bool:
    """NVIDIA's compute capability 9.x: the asynchronous products (wgmma) exist on no other chip."""
    return chip.vendor == "nvidia" and chip.capability[0] == 9 and dtype != torch.float32 and min(k_dim, v_dim) >= 64
