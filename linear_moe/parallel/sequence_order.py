"""From the order in which Megatron's batches lie over context-parallel ranks to that of time, and back.

Megatron cuts a sequence into 2 P chunks and gives rank r the chunks r and 2 P - 1 - r, so that causal attention costs
every rank the same. A recurrence costs the same anywhere, and wants each rank to hold one stretch of time. One
all-to-all of hidden states on the way into a MoM layer and one on the way out do it: D numbers a token each, of which
1 / P stay where they are, and that is the least of what a layer could exchange, for its queries, keys, values and gates
are wider. It is done in every layer, and not once for a run of them, because the residual stream that a MoM layer's
output is added to is not the layer's to reorder. Where all layers are MoM layers, our own entry cuts batches in the
order of time to begin with (``contiguous_context_slices``), and none of this is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Exchange:
    """One all-to-all of a rank's blocks, equally long stretches of tokens.

    Attributes:
        send_order: this rank's blocks sorted by where they go.
        sends, receives: blocks for and from every rank.
        place: where every block that arrives belongs.
    """

    send_order: list[int]
    sends: list[int]
    receives: list[int]
    place: list[int]


def plan_exchange(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]], rank: int) -> Exchange:
    """The exchange on one rank that takes the layout ``before`` to ``after``: the blocks of every rank, in order."""
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
    """Blocks of every rank in Megatron's order: two on each, or one where the tensor-parallel ranks halve a chunk.

    Args:
        context_size: ranks a sequence lies over.
        tensor_size: ranks that a context-parallel rank's tokens are split over in turn (sequence parallelism), or 1.
            Ranks count tensor-parallel first.
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
    """The same blocks in the order of time."""
    count = 1 if tensor_size % 2 == 0 else 2
    ranks = range(context_size * tensor_size)
    return [list(range(rank * count, (rank + 1) * count)) for rank in ranks]


class SequenceOrder:
    """Brings the hidden states of a group into the order of time, and back; differentiable.

    Args:
        group: the context-parallel group, or the tensor-and-context-parallel one under sequence parallelism.
        context_size: ranks a sequence lies over.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, context_size: int):
        self.group = group
        sizes = context_size, group.size() // context_size
        zigzag, contiguous = zigzag_layout(*sizes), contiguous_layout(*sizes)
        self._forth = plan_exchange(zigzag, contiguous, group.rank())
        self._back = plan_exchange(contiguous, zigzag, group.rank())

    def to_contiguous(self, x: torch.Tensor) -> torch.Tensor:
        """x [s, ...] from Megatron's order to that of time."""
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
