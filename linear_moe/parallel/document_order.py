"""Reorders the tokens of packed documents over context-parallel ranks, where every document is cut by itself.

Softmax attention over packed documents, and Megatron's --sft, cut every document into 2 P chunks and give rank r the
chunks r and 2 P - 1 - r of each document. A memory reads one contiguous stretch of the row of all documents. How many
tokens go from rank to rank depends on the documents' lengths, so every rank gathers the whole row and takes its part:
the host learns no length.

Shape legend: context-parallel ranks P, tokens of the whole row T, documents B, tokens on a rank s.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region


def places(borders: torch.Tensor, tokens: int, ranks: int) -> torch.Tensor:
    """Where each token of the row lies once every document is cut over the ranks: the token's number among all tokens
    of rank 0, then all of rank 1, and so on, [T] int64.

    Args:
        borders: [B + 1] first token of every document, and the end of the last; lengths are multiples of 2 P. Documents
            may be empty.
        tokens: T, of all ranks.
        ranks: P.
    """
    borders = borders.long()
    token = torch.arange(tokens, device=borders.device)
    document = torch.searchsorted(borders, token, right=True) - 1
    document = document.clamp(max=borders.shape[0] - 2)
    first = borders[document]
    chunk = ((borders[document + 1] - first) // (2 * ranks)).clamp(min=1)
    number = (token - first) // chunk
    late = number >= ranks
    owner = torch.where(late, 2 * ranks - 1 - number, number)
    return owner * (tokens // ranks) + first // ranks + late * chunk + (token - first) % chunk


def tokens_of_rank(borders: torch.Tensor, tokens: int, ranks: int, rank: int) -> torch.Tensor:
    """The tokens of the row that a rank holds, in the rank's order, [T / P] int64; arguments as for :func:`places`."""
    return places(borders, tokens, ranks).argsort().chunk(ranks)[rank]


class DocumentOrder:
    """Reorders hidden states over a process group; differentiable.

    Args:
        group: the context-parallel group; with sequence parallelism the tensor-and-context-parallel group, in which the
            tensor-parallel rank runs fastest.
        context_size: P.
        borders: as for :func:`places`.
        length: tokens of hidden states on a rank of the group.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, context_size: int, borders: torch.Tensor, length: int):
        self.group = group
        self._here = slice(group.rank() * length, (group.rank() + 1) * length)
        self._place = places(borders, length * group.size(), context_size)

    def to_contiguous(self, x: torch.Tensor) -> torch.Tensor:
        """Takes x [s, ...] from the order of documents cut one by one to the order of time."""
        return self._gather(x)[self._place[self._here]]

    def to_zigzag(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_contiguous`."""
        return self._gather(x)[self._place.argsort()[self._here]]

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of all ranks; in the backward pass the sum of all ranks' gradients."""
        return gather_from_sequence_parallel_region(x, group=self.group)
