"""Lets Megatron's plain 16-bit optimizer save and load a model that has float32 parameters among its 16-bit ones.

`Float16OptimizerWithFloat16Params` numbers all its parameters, and looks up each parameter's place in the model among
the 16-bit ones alone. After the first float32 parameter, such as the decay rates of a recurrence, every number names
another parameter. Muon chains optimizers of this class, and its layer-wise form gives each rank's share to one.
"""

import torch

from megatron_patches.patch import Patch, wrap


def _places(optimizer):
    """By group of the optimizer: its parameters in its own order, as (parameter of the model, float32 parameter).

    A float32 parameter of the model is its own float32 parameter.
    """
    of_copy = {
        id(copy): parameter
        for parameters, copies in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameter, copy in zip(parameters, copies, strict=True)
    }
    return [
        [(of_copy.get(id(updated), updated), updated) for updated in group["params"]]
        for group in optimizer.optimizer.param_groups
    ]


def _count_every_parameter(build, optimizer, *args, **kwargs):
    """Shows Megatron the float32 parameters among the 16-bit ones, so that both are numbered alike.

    The float32 copies in the result are of 16-bit parameters only, as `load_state_dict` expects: a float32 parameter is
    in the model's part of the checkpoint.
    """
    if optimizer.is_stub_optimizer or not any(optimizer.fp32_from_fp32_groups):
        return build(optimizer, *args, **kwargs)
    places = _places(optimizer)
    kept = optimizer.float16_groups, optimizer.fp32_from_float16_groups
    optimizer.float16_groups = [[parameter for parameter, _ in group] for group in places]
    optimizer.fp32_from_float16_groups = [[updated for _, updated in group] for group in places]
    try:
        state = build(optimizer, *args, **kwargs)
    finally:
        optimizer.float16_groups, optimizer.fp32_from_float16_groups = kept
    state["fp32_from_fp16_params"] = [
        [saved for (parameter, _), saved in zip(group, entries, strict=True) if parameter.dtype != torch.float32]
        for group, entries in zip(places, state["fp32_from_fp16_params"], strict=True)
    ]
    return state


PATCH = Patch(
    name="float16-optimizer",
    reason="Float16OptimizerWithFloat16Params counts 16-bit parameters only where it looks up a parameter's place in "
    "the model, and cannot save a model that has float32 parameters too",
    removed_when="Float16OptimizerWithFloat16Params maps its optimizer's parameters in their own order",
    targets=(
        wrap(
            "megatron.core.optimizer.optimizer",
            "Float16OptimizerWithFloat16Params.sharded_state_dict",
            _count_every_parameter,
        ),
    ),
)
