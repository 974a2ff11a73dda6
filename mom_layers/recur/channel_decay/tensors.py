"""Tensors that the host functions of a kernel set hand to each other.

Shape legend: rows R, heads H, key size K, value size V, chunk length C, chunk slots N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Chunks a span. Four, where other families take eight: the state gradients walk from a span's start to each of its
# chunks anew, and that work grows with the square of a span. Not tuned.
SPAN = 4


@dataclass(frozen=True)
class Inputs:
    """What both passes read, contiguous.

    Attributes:
        q, k: [R, H, K].
        v: [R, H, V], of q's type.
        g: [R, H, K] log of every key channel's decay.
        scale: of q.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    scale: float

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def k_dim(self) -> int:
        return self.q.shape[2]

    @property
    def v_dim(self) -> int:
        return self.v.shape[2]


@dataclass(frozen=True)
class ChunkLocal:
    """What a chunk computes from its own rows, without the state.

    Attributes:
        q_decayed, k_decayed: [R, H, K] q~ and k~, in q's type.
        decays: [N, H, K] float32, exp(g(start, end]): what a chunk leaves of each key channel of the state.
        whole_chunks: [N, H] int32, 1 where a chunk of a head is whole (see `triton.chunk_local`), else 0.
        scores: [N, H, C, C] P, in q's type.
    """

    q_decayed: torch.Tensor
    k_decayed: torch.Tensor
    decays: torch.Tensor
    whole_chunks: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class StateParts:
    """What the states give to the gradients of q, k and g.

    Attributes:
        u, w: [R, H, K], in q's type: the gradients of q exp(g(start, row]) and of k exp(g(row, end]).
        d_decays: [N, H, K] float32, the gradient of a chunk's sum of g through the decay of the state.
    """

    u: torch.Tensor
    w: torch.Tensor
    d_decays: torch.Tensor
