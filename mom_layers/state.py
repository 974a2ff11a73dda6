"""What a layer keeps between calls. Its size does not depend on the number of tokens seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch


@dataclass
class MemoryState:
    """State of one layer for B sequences and all memories A, the shared memory last.

    Attributes:
        recurrent: [B, A, H, K, V] float32 (float64 in a float64 model), what the memories hold.
        q_tail, k_tail: [B, A, W - 1, H * K], the last inputs of each memory's convolutions, the latest last.
        v_tail: [B, A, W - 1, H * V].
        text_tail: [B, W' - 1, D], the last tokens of every sequence, for a convolution over the text; None without.
    """

    recurrent: torch.Tensor
    q_tail: torch.Tensor
    k_tail: torch.Tensor
    v_tail: torch.Tensor
    text_tail: torch.Tensor | None = None

    def select(self, index: torch.Tensor) -> MemoryState:
        """The state of the sequences at ``index`` [B'], in that order: beam search and shrinking batches."""
        return MemoryState(**{name: part.index_select(0, index) for name, part in self.named_tensors()})

    def copy_(self, other: MemoryState) -> None:
        """Copies another state's numbers into this state's tensors."""
        for name, part in self.named_tensors():
            part.copy_(getattr(other, name))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for _, part in self.named_tensors())

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and tensor of everything that the layer keeps."""
        for f in fields(self):
            if getattr(self, f.name) is not None:
                yield f.name, getattr(self, f.name)
