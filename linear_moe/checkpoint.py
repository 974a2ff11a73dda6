"""Names for the pieces of a fused parameter in a distributed checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory


def split_for_checkpoint(tensor: ShardedTensor, dim: int, names: list[str], sizes: list[int]) -> ShardedTensorFactory:
    """Stores a fused parameter as one checkpoint entry a piece, ``key.name``.

    A fused dimension that is sharded as a whole would come back in another order at another tensor-parallel size;
    its pieces, each sharded by head, do not. (megatron-core has the same for dimension 0 only.)

    Args:
        tensor: the sharded parameter.
        dim: the fused dimension, of the local tensor.
        names, sizes: of the pieces, in order; the sizes are local and cover the dimension.
    """
    if sum(sizes) != tensor.local_shape[dim] or len(names) != len(sizes):
        raise ValueError(f"pieces {dict(zip(names, sizes, strict=False))} do not cover {tensor.local_shape[dim]}")
    layout = tensor.without_data()

    @torch.no_grad()
    def build(key, data, replica_id, flattened_range):
        whole = replace(
            layout, key=key, data=data, dtype=data.dtype, replica_id=replica_id, flattened_range=flattened_range
        )
        pieces, first = [], 0
        for name, size in zip(names, sizes, strict=True):
            for piece in whole.narrow(dim, first, size):
                piece.key = f"{key}.{name}"
                pieces.append(piece)
            first += size
        return pieces

    @torch.no_grad()
    def merge(pieces):
        return torch.cat(pieces, dim)

    return ShardedTensorFactory(tensor.key, tensor.data, build, merge, tensor.replica_id)
