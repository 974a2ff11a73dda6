"""A layer under torch's FSDP2 in a distributed checkpoint: as the layer without FSDP2 is.

FSDP2 cuts every parameter along its first dimension, in shards that may differ in size and end inside a piece of a
fused parameter. Megatron describes only equal shards of parameters that are not fused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch.distributed.tensor import DTensor


@contextmanager
def whole_parameters(module: torch.nn.Module) -> Iterator[dict[int, DTensor]]:
    """Gives a module whole parameters for a while, in place of FSDP2's shards.

    Yields the sharded parameters by the id of the whole tensor. Nothing changes in a module without shards.
    """
    places = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    shards = {}
    for owner, name, parameter in places:
        whole = torch.nn.Parameter(parameter.detach().full_tensor(), requires_grad=False)
        owner._parameters[name] = whole
        shards[id(whole)] = parameter
    try:
        yield shards
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter


def store_shard(whole: ShardedTensor | ShardedTensorFactory, parameter: DTensor) -> ShardedTensorFactory:
    """Describes a shard of a parameter by the description of the whole parameter.

    Saving gathers the shards, and loading cuts the parameter. Both are collective: every rank of the parameter's mesh
    must save or load.
    """
    mesh, placements, shape, stride = parameter.device_mesh, parameter.placements, parameter.shape, parameter.stride()

    @torch.no_grad()
    def build(key, data, replica_id, flattened_range):
        gathered = DTensor.from_local(data, mesh, placements, shape=shape, stride=stride).full_tensor()
        if isinstance(whole, ShardedTensorFactory):
            return whole.build_fn(key, gathered, replica_id, flattened_range)
        return [replace(whole, key=key, data=gathered, dtype=gathered.dtype, replica_id=replica_id)]

    @torch.no_grad()
    def merge(loaded):
        full = whole.merge_fn(loaded) if isinstance(whole, ShardedTensorFactory) else loaded[0]
        rows = -(-shape[0] // mesh.size())  # as FSDP2 cuts: the last shards may be shorter, or empty
        first = min(mesh.get_local_rank() * rows, shape[0])
        return full[first : first + rows].clone()

    return ShardedTensorFactory(whole.key, parameter._local_tensor, build, merge, whole.replica_id)
