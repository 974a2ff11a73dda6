"""Lets the layer-wise optimizer (Muon over data-parallel ranks) pass on float32 parameters beside 16-bit ones.

Every rank updates its share of the parameters and then sends the share to the others as one flat tensor. A share that
holds both types becomes float32, and a rank whose share has 16-bit parameters only sends 16 bits, which the others
receive as float32. gloo, which takes tensors of one size, cannot send shares of different sizes at all.
"""

import torch
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_patches.patch import Patch, wrap


def _gather_one_type(shares, group) -> None:
    """All-gathers parameters of one type, each from the rank that updated it.

    shares: of every rank of the group, the parameters that the rank updated.
    """
    sizes = [sum(parameter.numel() for parameter in share) for share in shares]
    like = next(parameter for share in shares for parameter in share)
    sent = like.new_zeros(max(sizes))
    mine = group.rank()
    if sizes[mine]:
        sent[: sizes[mine]] = _flatten_dense_tensors(shares[mine])
    received = like.new_empty(len(shares) * max(sizes))
    torch.distributed.all_gather_into_tensor(received, sent, group=group)
    for rank, (share, flat) in enumerate(zip(shares, received.chunk(len(shares)), strict=True)):
        if rank != mine and share:
            for parameter, value in zip(share, _unflatten_dense_tensors(flat[: sizes[rank]], share), strict=True):
                parameter.data.copy_(value)


def _gather_each_type(gather, optimizer) -> None:
    """Megatron's own gathering where all parameters have one type and the backend is not gloo."""
    groups = optimizer.pg_collection
    if groups is None:
        return gather(optimizer)
    dense = optimizer.dp_cp_params_list, groups.dp_cp
    experts = optimizer.expt_dp_params_list, groups.expt_dp
    shares_of_groups = [(shares, group) for shares, group in (dense, experts) if shares]
    types = {parameter.dtype for shares, _ in shares_of_groups for share in shares for parameter in share}
    over_gloo = any(torch.distributed.get_backend(group) == "gloo" for _, group in shares_of_groups)
    if len(types) == 1 and not over_gloo:
        return gather(optimizer)
    with torch.no_grad():
        for shares, group in shares_of_groups:
            # Every rank has every list, and so makes the same calls in the same order.
            for dtype in sorted({parameter.dtype for share in shares for parameter in share}, key=str):
                _gather_one_type([[p for p in share if p.dtype == dtype] for share in shares], group)


PATCH = Patch(
    name="layer-wise-optimizer",
    reason="LayerWiseDistributedOptimizer sends parameters of several types as one flat tensor, and cannot "
    "send over gloo",
    removed_when="allgather_params gathers each type apart",
    targets=(
        wrap(
            "megatron.core.optimizer.layer_wise_optimizer",
            "LayerWiseDistributedOptimizer.allgather_params",
            _gather_each_type,
        ),
    ),
)
