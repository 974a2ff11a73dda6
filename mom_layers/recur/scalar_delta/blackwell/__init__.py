"""The kernel set for Blackwell's data centre chips (B200, GB200, B300): the general set's kernels with other tiles."""

from functools import partial

import torch

from mom_layers.recur.scalar_delta import triton
from mom_layers.recur.scalar_delta.blackwell.launches import launches_for

NAME = "Blackwell"

chunk_local = partial(triton.chunk_local, launches_for=launches_for)
recurrence = partial(triton.recurrence, launches_for=launches_for)
reverse_recurrence = partial(triton.reverse_recurrence, launches_for=launches_for)
state_gradients = partial(triton.state_gradients, launches_for=launches_for)
local_gradients = partial(triton.local_gradients, launches_for=launches_for)


def takes(chip, dtype, k_dim, v_dim) -> bool:
    """NVIDIA's compute capability 10.x, with 16-bit inputs: the products of tensor memory (tcgen05) exist there."""
    return chip.vendor == "nvidia" and chip.capability[0] == 10 and dtype != torch.float32
