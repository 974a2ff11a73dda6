"""The kernel set for Blackwell's data centre chips (B200, GB200, B300): the general set's kernels with other tiles."""

from functools import partial

import torch

from mom_layers.recur.scalar_decay import triton
from mom_layers.recur.scalar_decay.blackwell.launches import launches_for

NAME = "Blackwell"

chunk_decays = triton.chunk_decays
part_states = partial(triton.part_states, launches_for=launches_for)
walk = partial(triton.walk, launches_for=launches_for)
decay_gradient = partial(triton.decay_gradient, launches_for=launches_for)


def takes(chip, dtype, k_dim, v_dim) -> bool:
    """NVIDIA's compute capability 10.x, with 16-bit inputs: the products of tensor memory (tcgen05) exist there."""
    return chip.vendor == "nvidia" and chip.capability[0] == 10 and dtype != torch.float32
