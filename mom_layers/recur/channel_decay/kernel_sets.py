"""The kernel sets of gated linear attention.

A set is a module (a file or a folder) with NAME and ``takes``, as `mom_layers.recur.kernel_sets` describes, and with
the host functions below, which are called by keyword and launch the kernels. A set may import a function of another
set, or bind that function to launches of its own: ``functools.partial(triton.recurrence, launches_for=launches_for)``.

    chunk_local(inputs, chunks, scores=None) -> ChunkLocal
    recurrence(inputs, local, chunks, initial_state, output_final_state, for_backward) -> (o, final_state, span_states)
    reverse_recurrence(inputs, do, local, chunks, d_final_state, store_d_initial_state)
        -> (dv, d_span_states, d_initial_state)
    state_gradients(inputs, do, local, chunks, span_states, d_span_states) -> StateParts
    local_gradients(inputs, do, chunks, parts, whole_chunks) -> (dq, dk, dg)

The functions of the general set, `mom_layers.recur.channel_decay.triton`, say what each argument and result is.
"""

from __future__ import annotations

from types import ModuleType

import torch

from mom_layers.common.chips import cached_choice, chip_of
from mom_layers.recur.channel_decay import hopper, triton
from mom_layers.recur.kernel_sets import choose

# The first set that takes a chip runs there; the general one takes every chip and stands last.
KERNEL_SETS = (hopper, triton)


@cached_choice
def kernel_set(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> ModuleType:
    """The kernel set that runs on a device, for inputs of a type and head sizes K and V."""
    return choose("gated linear attention", KERNEL_SETS, chip_of(device), dtype, k_dim, v_dim)
