"""What a layer keeps between calls. Its size does not depend on the number of tokens seen."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass
class MemoryState:
    """State of one layer for B sequences and all memories A, the shared memory last.

    Attributes:
        recurrent: [B, A, H, K, V] float32 (float64 in a float64 model), what the memories hold.
        q_tail, k_tail: [B, A, W - 1, H * K], the last inputs of each memory's convolutions, the latest last.
        v_tail: [B, A, W - 1, H * V].
    """

    recurrent: torch.Tensor
    q_tail: torch.Tensor
    k_tail: torch.Tensor
    v_tail: torch.Tensor

    def select(self, index: torch.Tensor) -> MemoryState:
        """The state of the sequences at ``index`` [B'], in that order: beam search and shrinking batches."""
        return MemoryState(*(getattr(self, f.name).index_select(0, index) for f in fields(self)))

    def copy_(self, other: MemoryState) -> None:
        """Copies another state's numbers into this state's tensors."""
        for f in fields(self):
            getattr(self, f.name).copy_(getattr(other, f.name))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, f.name).nbytes for f in fields(self))
