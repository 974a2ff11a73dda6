"""What a layer remembers between calls: constant in the number of tokens seen."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass
class MemoryState:
    """State of one layer for B sequences and G memories (the shared one last).

    Attributes:
        recurrent: [B, G, H, K, V] float32 (float64 in a float64 model).
        q_tail, k_tail: [B, G, W - 1, H * K], the last inputs of each memory's convolutions, most recent last.
        v_tail: [B, G, W - 1, H * V].
    """

    recurrent: torch.Tensor
    q_tail: torch.Tensor
    k_tail: torch.Tensor
    v_tail: torch.Tensor

    def select(self, index: torch.Tensor) -> MemoryState:
        """The state of the sequences at ``index`` [B'], in that order: beam search and shrinking batches."""
        return MemoryState(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def copy_(self, other: MemoryState) -> None:
        """Takes over another state's numbers, in place."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))

    @property
    def nbytes(self) -> int:
        return sum(getattr(self, f.name).nbytes for f in fields(self))
