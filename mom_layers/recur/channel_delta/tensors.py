"""Tensors that the host functions of a kernel set hand to each other.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunk slots N, span slots M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Inputs:
    """What both passes read of the keys' side, contiguous.

    Attributes:
        q, k: [R, H, K].
        g: [R, H, K] log of every key channel's decay.
        erase: [R, H], or [R, H, K] a channel.
        scale: of q.
    """

    q: torch.Tensor
    k: torch.Tensor
    g: torch.Tensor
    erase: torch.Tensor
    scale: float

    @property
    def num_heads(self) -> int:
        return self.q.shape[1]

    @property
    def k_dim(self) -> int:
        return self.q.shape[2]

    @property
    def erases_channels(self) -> bool:
        """Whether every key channel has its own erase strength."""
        return self.erase.dim() == 3


@dataclass(frozen=True)
class Values:
    """What both passes read of the values' side, contiguous.

    Attributes:
        v: [R, H, V], of q's type.
        write: [R, H], or [R, H, V] a channel.
    """

    v: torch.Tensor
    write: torch.Tensor

    @property
    def writes_channels(self) -> bool:
        """Whether every value channel has its own write strength."""
        return self.write.dim() == 3


@dataclass(frozen=True)
class ChunkLocal:
    """What a chunk computes from its own rows, without the state.

    Attributes:
        q_decayed, k_decayed, erase_decayed: [R, H, K] q~, k~ and E~, in q's type.
        decays: [N, H, K] float32, exp(g(start, end]): what a chunk leaves of each key channel of the state.
        whole_chunks: [N, H] int32, 1 where all of a chunk's pairs of rows meet on the first level (`triton.levels`).
        solve, scores: [N, H, C, C] X and P, in q's type.
    """

    q_decayed: torch.Tensor
    k_decayed: torch.Tensor
    erase_decayed: torch.Tensor
    decays: torch.Tensor
    whole_chunks: torch.Tensor
    solve: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class RecurrenceResults:
    """What the recurrence returns.

    Attributes:
        o: [R, H, V], in v's type.
        final_state: [S, H, K, V] float32, or None.
        errors: [R, H, V] e, in v's type; None unless a backward pass follows.
        span_states: [M, H, K, V] the state before every span, in v's type; None unless a backward pass follows.
    """

    o: torch.Tensor
    final_state: torch.Tensor | None
    errors: torch.Tensor | None
    span_states: torch.Tensor | None


@dataclass(frozen=True)
class ErrorRows:
    """Rows of the values' side that the gradients of the keys' side read, [R, H, V] each, in v's type.

    Attributes:
        errors: e.
        d_errors: y, the gradient of what a row writes.
        do: the gradient of o.
    """

    errors: torch.Tensor
    d_errors: torch.Tensor
    do: torch.Tensor


@dataclass(frozen=True)
class ScoreGradients:
    """What a chunk's rows of the values' side give.

    Attributes:
        d_scores, d_key_scores: [N, H, C, C] dP, and dA: bfloat16 for 16-bit inputs.
        dv: [R, H, V], in v's type.
        d_write: as write, float32 where write is [R, H].
    """

    d_scores: torch.Tensor
    d_key_scores: torch.Tensor
    dv: torch.Tensor
    d_write: torch.Tensor
