"""Names for the pieces of a fused parameter in a distributed checkpoint."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory


def split_for_checkpoint(
    tensor: ShardedTensor, dim: int, names: list[str], sizes: list[int], *, first: int = 0, total: int | None = None
) -> ShardedTensorFactory:
    """Stores a fused parameter as one checkpoint entry a piece, ``key.name``.

    Every piece is sharded by head, and loads at any tensor-parallel size. A fused dimension sharded as a whole would
    load in another order at another size. (megatron-core has such a function for dimension 0 only.)

    Args:
        tensor: the sharded parameter.
        dim: the fused dimension, of the local tensor.
        names, sizes: of the pieces, in order; the sizes are local and cover the dimension.
        first, total: dimension 0 holds the elements from ``first`` on, of ``total`` elements on all ranks (memories
            over ranks); ranks may hold different numbers of elements. Without ``total`` the offset is ``tensor``'s.
    """
    if sum(sizes) != tensor.local_shape[dim] or len(names) != len(sizes):
        raise ValueError(
            f"pieces {dict(zip(names, sizes, strict=False))} of dimension {dim}: expected a size for each name, and "
            f"sizes that sum to {tensor.local_shape[dim]}"
        )
    layout = tensor.without_data()

    @torch.no_grad()
    def build(key, data, replica_id, flattened_range):
        whole = replace(
            layout, key=key, data=data, dtype=data.dtype, replica_id=replica_id, flattened_range=flattened_range
        )
        parts = [whole] if total is None else _elements(whole, first, total)
        return [piece for part in parts for piece in _pieces(part, dim, names, sizes)]

    @torch.no_grad()
    def merge(pieces):
        parts = [torch.cat(pieces[i : i + len(names)], dim) for i in range(0, len(pieces), len(names))]
        return torch.cat(parts)

    return ShardedTensorFactory(tensor.key, tensor.data, build, merge, tensor.replica_id)


def _pieces(tensor: ShardedTensor, dim: int, names: list[str], sizes: list[int]) -> list[ShardedTensor]:
    pieces, first = [], 0
    for name, size in zip(names, sizes, strict=True):
        for piece in tensor.narrow(dim, first, size):
            pieces.append(replace(piece, key=f"{tensor.key}.{name}"))
        first += size
    return pieces


def _elements(tensor: ShardedTensor, first: int, total: int) -> list[ShardedTensor]:
    """One sharded tensor for each element of dimension 0: all parts of a checkpoint entry must have one size."""
    axis = tensor.prepend_axis_num

    def at(values, value):
        return (*values[:axis], value, *values[axis + 1 :])

    return [
        replace(
            tensor,
            data=tensor.data[i : i + 1],
            local_shape=(1, *tensor.local_shape[1:]),
            global_shape=at(tensor.global_shape, total),
            global_offset=at(tensor.global_offset, first + i),
            axis_fragmentations=at(tensor.axis_fragmentations, total),
        )
        for i in range(tensor.local_shape[0])
    ]
