"""Reorders tokens over context-parallel ranks: from the order of Megatron's batches to the order of time, and back.

Megatron cuts a sequence into 2 P chunks and gives rank r the chunks r and 2 P - 1 - r, so that causal attention costs
every rank the same. A recurrence costs every rank the same in any order, and needs one contiguous stretch of time on
each rank. So an all-to-all exchanges hidden states before a MoM layer, and another does so after the layer. Each moves
D numbers a token, of which 1 / P stay on their rank. That is the least that a layer could exchange: its queries, keys,
values and gates together are wider.

Every MoM layer reorders on its own, also where several MoM layers follow each other: the residual stream, to which the
layer's output is added, stays in Megatron's order. Where all layers are MoM layers, ``contiguous_context_slices`` cuts
the batches in the order of time from the start, and no layer reorders.

Shape legend: context-parallel ranks P, hidden size D, tokens on a rank s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Exchange:
    """A rank's part in one all-to-all of blocks. A block is a stretch of tokens; all blocks have the same length.

    Attributes:
        send_order: places of this rank's blocks, sorted by the rank that receives each block.
        sends, receives: numbers of blocks that go to each rank, and that come from each rank.
        place: for each place of the new order, the number of the arriving block that belongs there.
    """

    send_order: list[int]
    sends: list[int]
    receives: list[int]
    place: list[int]


def plan_exchange(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], rank: int) -> Exchange:
    """Plans one rank's part of the all-to-all that changes one layout to another.

    Args:
        before, after: the two layouts: for every rank, the numbers of its blocks in order.
        rank: the rank to plan for.
    """
    owner = {block: to for to, blocks in enumerate(after) for block in blocks}

    def sent(blocks):
        return sorted(blocks, key=lambda block: (owner[block], block))

    mine = sent(before[rank])
    arriving = [[block for block in sent(blocks) if owner[block] == rank] for blocks in before]
    arrival = [block for blocks in arriving for block in blocks]
    return Exchange(
        send_order=[before[rank].index(block) for block in mine],
        sends=[sum(owner[block] == to for block in mine) for to in range(len(after))],
        receives=[len(blocks) for blocks in arriving],
        place=[arrival.index(block) for block in after[rank]],
    )


def zigzag_layout(context_size: int, tensor_size: int) -> list[list[int]]:
    """Returns the blocks of every rank in Megatron's order.

    A rank has two blocks, or one block where the number of tensor-parallel ranks is even.

    Args:
        context_size: number of context-parallel ranks.
        tensor_size: number of tensor-parallel ranks that share the tokens of one context-parallel rank (sequence
            parallelism), or 1. The tensor-parallel rank runs fastest in the numbers of ranks.
    """
    count = 1 if tensor_size % 2 == 0 else 2
    half = count * tensor_size // 2  # blocks in a chunk
    layout = []
    for rank in range(context_size):
        chunks = rank, 2 * context_size - 1 - rank
        blocks = [chunk * half + i for chunk in chunks for i in range(half)]
        layout += [blocks[i * count : (i + 1) * count] for i in range(tensor_size)]
    return layout


def contiguous_layout(context_size: int, tensor_size: int) -> list[list[int]]:
    """Returns the blocks of every rank in the order of time; arguments and blocks as for :func:`zigzag_layout`."""
    count = 1 if tensor_size % 2 == 0 else 2
    ranks = range(context_size * tensor_size)
    return [list(range(rank * count, (rank + 1) * count)) for rank in ranks]


class SequenceOrder:
    """Reorders hidden states over a process group; differentiable.

    Args:
        group: the context-parallel group; with sequence parallelism the tensor-and-context-parallel group.
        context_size: number of context-parallel ranks.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, context_size: int):
        self.group = group
        sizes = context_size, group.size() // context_size
        zigzag, contiguous = zigzag_layout(*sizes), contiguous_layout(*sizes)
        self._forth = plan_exchange(zigzag, contiguous, group.rank())
        self._back = plan_exchange(contiguous, zigzag, group.rank())

    def to_contiguous(self, x: torch.Tensor) -> torch.Tensor:
        """Takes x [s, ...] from Megatron's order to the order of time."""
        return _Reorder.apply(x, self._forth, self._back, self.group)

    def to_zigzag(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_contiguous`."""
        return _Reorder.apply(x, self._back, self._forth, self.group)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, forth, back, group):
        ctx.exchanges, ctx.group = (forth, back), group
        return _exchange(x, forth, group)

    @staticmethod
    def backward(ctx, grad):
        forth, back = ctx.exchanges
        return _exchange(grad, back, ctx.group), None, None, None


def _reordered(x: torch.Tensor, order: list[int]) -> torch.Tensor:
    """The equally long blocks of x in another order, contiguous."""
    if order == sorted(order):
        return x.contiguous()
    blocks = x.chunk(len(order))
    return torch.cat([blocks[i] for i in order])


def _exchange(x: torch.Tensor, exchange: Exchange, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    count = len(exchange.place)
    if x.shape[0] % count:
        raise ValueError(f"{x.shape[0]} tokens on a rank do not split into the {count} chunks of context parallelism")
    length = x.shape[0] // count
    arrived = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.distributed.all_to_all_single(
        arrived,
        _reordered(x, exchange.send_order),
        [length * blocks for blocks in exchange.receives],
        [length * blocks for blocks in exchange.sends],
        group=group,
    )
    return _reordered(arrived, exchange.place)
