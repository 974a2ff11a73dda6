"""The kernel sets of scalar decay.

A set is a module (a file or a folder) with NAME and ``takes``, as `mom_layers.recur.kernel_sets` describes, and with
the functions below. The host functions are called by keyword and launch the kernels. A set may import a function of
another set, or bind that function to launches of its own, as ``functools.partial(triton.walk, launches_for=...)``.

    launches_for(device, dtype, a_dim, c_dim) -> Launches
    chunk_decays(inputs, cuts) -> decays
    part_states(b, c, decays, cuts, scale, against_time) -> PartStates
    walk(a, b, c, decays, cuts, scale, against_time, transposed=False, first_state=None, part_states=None,
         last_state=None, reader=None, terms=None) -> out
    decay_gradient(inputs, do, decays, cuts, terms, from_zero) -> dg

The functions of the general set, `mom_layers.recur.scalar_decay.triton`, say what each argument and result is.
"""

from __future__ import annotations

from types import ModuleType

import torch

from mom_layers.common.chips import cached_choice, chip_of
from mom_layers.recur.kernel_sets import choose
from mom_layers.recur.scalar_decay import blackwell, triton

# The first set that takes a chip runs there; the general one takes every chip and stands last.
KERNEL_SETS = (blackwell, triton)


@cached_choice
def kernel_set(device: torch.device, dtype: torch.dtype, k_dim: int, v_dim: int) -> ModuleType:
    """The kernel set that runs on a device, for inputs of a type and head sizes K and V."""
    return choose("scalar decay", KERNEL_SETS, chip_of(device), dtype, k_dim, v_dim)
