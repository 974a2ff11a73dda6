"""Gives Transformer Engine's Adam states that are sharded as their parameters are.

Transformer Engine's FusedAdam makes a state of the parameter's shape. A parameter that torch's FSDP2 or Megatron FSDP
shards has the shape of the whole parameter: every rank would hold the whole state, and Megatron cannot save such a
state. torch's own Adam makes a state of the parameter's kind.
"""

import functools

import torch
from torch.distributed.tensor import DTensor

from megatron_patches.patch import Patch, wrap

_MAKE_STATE = "_initialize_state"


def _make_sharded_state(make_state, optimizer, parameter, name, *args, **kwargs):
    make_state(parameter, name, *args, **kwargs)
    state = optimizer.state[parameter]
    # An fp8 state is a tensor of a class of its own, which has no sharded form.
    if isinstance(parameter, DTensor) and type(state[name]) is torch.Tensor:
        state[name] = torch.zeros_like(parameter, dtype=state[name].dtype, requires_grad=False)


def _shard_states(get_optimizer, *args, **kwargs):
    found = get_optimizer(*args, **kwargs)
    optimizer = found[0] if isinstance(found, tuple) else found.optimizer
    if make_state := getattr(optimizer, _MAKE_STATE, None):
        setattr(optimizer, _MAKE_STATE, functools.partial(_make_sharded_state, make_state, optimizer))
    return found


PATCH = Patch(
    name="optimizer-shards",
    reason="Transformer Engine's FusedAdam holds the whole state of a parameter that FSDP shards, which is not saved",
    removed_when="FusedAdam makes the states of a DTensor as DTensors",
    targets=(wrap("megatron.core.optimizer", "_get_megatron_optimizer_based_on_param_groups", _shard_states),),
)
