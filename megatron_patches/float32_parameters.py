"""Lets the distributed optimizer save and load the state of parameters that are float32 themselves, on any device.

Models trained in float32 need this, and so do models in bfloat16 with a few float32 parameters, such as the decay
rates of a recurrence.
"""

import torch

from megatron_patches.patch import Patch, wrap


def _without_gradient(load, *args, **kwargs):
    """Loads with autograd off: the main parameter that is loaded is a view of a parameter that requires a gradient."""
    with torch.no_grad():
        return load(*args, **kwargs)


def _float32_first(build, *args, **kwargs):
    """Sorts each group's parameters as the optimizer does: float32 parameters first.

    Megatron makes the map from a parameter to its place in the optimizer's list in the buffers' order. In a group of
    float32 and 16-bit parameters that map names another parameter's state.
    """
    places, groups = build(*args, **kwargs)
    for group_index, group in enumerate(groups):
        group["params"].sort(key=lambda parameter: parameter.dtype != torch.float32)
        for order, parameter in enumerate(group["params"]):
            places[parameter] = (group_index, order)
    return places, groups


_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer"

PATCH = Patch(
    name="float32-parameters",
    reason="DistributedOptimizer mixes up the states of float32 and 16-bit parameters of one group, and copies loaded "
    "float32 parameters in place while autograd is on",
    removed_when="DistributedOptimizer detaches float32 parameters and maps parameters in its optimizer's order",
    targets=(
        wrap(_OPTIMIZER, "DistributedOptimizer._set_main_param_and_optimizer_states", _without_gradient),
        wrap(_OPTIMIZER, "DistributedOptimizer._build_optimizer_group_ranges", _float32_first),
    ),
)
