"""Collectives of one size on every rank, and the same as operations with gradients.

Shape legend: ranks E, N elements of the first dimension on a rank, the same number on every rank.
"""

from __future__ import annotations

import torch


def gather(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """x [N, ...] of all ranks, one after the other, [E N, ...]."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def scatter_sum(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """This rank's part [N, ...] of the sum of all ranks' x [E N, ...]."""
    own = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    torch.distributed.reduce_scatter_tensor(own, x.contiguous(), group=group)
    return own


class Gather(torch.autograd.Function):
    """(x, group) -> :func:`gather`, whose gradient is a reduce-scatter."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return gather(x, group)

    @staticmethod
    def backward(ctx, grad):
        return scatter_sum(grad, ctx.group), None


class ScatterSum(torch.autograd.Function):
    """(x, group) -> :func:`scatter_sum`, whose gradient is an all-gather."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return scatter_sum(x, group)

    @staticmethod
    def backward(ctx, grad):
        return gather(grad, ctx.group), None
