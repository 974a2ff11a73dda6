"""Lets Megatron's plain 16-bit optimizer save and load a model that has float32 parameters among its 16-bit ones.

`Float16OptimizerWithFloat16Params` numbers all its parameters, and looks up each parameter's place in the model among
the 16-bit ones alone. After the first float32 parameter, such as the decay rates of a recurrence, every number names
another parameter. Muon chains optimizers of this class, and its layer-wise form gives each rank's share to one.
"""

from functools import partial

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


def _empty_groups_stay(build, optimizer, *args, **kwargs):
    """Keeps a rank's empty groups, such as the memories' on a pipeline stage without memories, out of the checkpoint.

    What is no tensor is saved by rank 0 for all ranks, and empty lists and dicts of rank 0 are none of the others'.
    """
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject

    state = build(optimizer, *args, **kwargs)
    of_parameters = state.get("optimizer", state)  # Megatron's float32 optimizer has no entry of this name
    if not of_parameters["state"]:
        of_parameters["state"] = LocalNonpersistentObject({})
    copies = state.get("fp32_from_fp16_params", [])
    copies[:] = [group or LocalNonpersistentObject([]) for group in copies]
    return state


def _save_every_group(build, optimizer, *args, **kwargs):
    return _empty_groups_stay(partial(_count_every_parameter, build), optimizer, *args, **kwargs)


def _groups_in_order(load, optimizer, state):
    """Megatron's loading makes a list a dict where some of the list's groups were kept out of the checkpoint."""
    copies = state.get("fp32_from_fp16_params")
    if isinstance(copies, dict):
        state = state | {"fp32_from_fp16_params": [group for _, group in sorted(copies.items())]}
    return load(optimizer, state)


def _step_of_empty_groups(synchronize, chain):
    """Gives the number of steps to groups that are empty on this rank, which rank 0 may save for the others.

    Only where groups have one: Adam's have, Muon's do not.
    """
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    step = synchronize(chain)
    plain = (Float16OptimizerWithFloat16Params, FP32Optimizer)
    inner = [part.optimizer for part in chain.chained_optimizers if isinstance(part, plain) and part.optimizer]
    counting = {type(adam) for adam in inner for group in adam.param_groups if group["params"] and "step" in group}
    for optimizer in inner:
        for group in optimizer.param_groups:
            if type(optimizer) in counting and not group["params"]:
                group["step"] = step
    return step


_OPTIMIZER = "megatron.core.optimizer.optimizer"
_FLOAT16 = "Float16OptimizerWithFloat16Params"

PATCH = Patch(
    name="float16-optimizer",
    reason="Float16OptimizerWithFloat16Params counts 16-bit parameters only where it looks up a parameter's place in "
    "the model, and cannot save a model that has float32 parameters too; groups that are empty on a pipeline stage are "
    "not loaded",
    removed_when="Float16OptimizerWithFloat16Params maps its optimizer's parameters in their own order, and Megatron's "
    "test of loading covers an optimizer that has no parameter on one rank",
    targets=(
        wrap(_OPTIMIZER, f"{_FLOAT16}.sharded_state_dict", _save_every_group),
        wrap(_OPTIMIZER, f"{_FLOAT16}.load_state_dict", _groups_in_order),
        wrap(_OPTIMIZER, "FP32Optimizer.sharded_state_dict", _empty_groups_stay),
        wrap(_OPTIMIZER, "ChainedOptimizer._synchronize_steps", _step_of_empty_groups),
    ),
)
