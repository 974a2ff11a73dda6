"""Tensors that the host functions of a kernel set hand to each other.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunk slots N, span slots M.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mom_layers.recur.chunks import Chunks


@dataclass(frozen=True)
class Inputs:
    """What both passes read, contiguous. The backward pass needs no values: it reads the errors instead.

    Attributes:
        q, k: [R, H, K].
        g: [R, H] log decay.
        beta: [R, H] write strength.
        scale: of q.
    """

    q: torch.Tensor
    k: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    scale: float


@dataclass(frozen=True)
class ChunkLocal:
    """What a chunk computes from its own rows, without the state.

    Attributes:
        decays: [N, H, 2, C] float32, exp(G) and exp(G_last - G).
        solve: [N, H, C, C] in q's type, X.
        scores: [N, H, C, C] in q's type, P.
    """

    decays: torch.Tensor
    solve: torch.Tensor
    scores: torch.Tensor


@dataclass(frozen=True)
class RecurrenceResults:
    """What the recurrence fills; None where nothing is stored.

    Attributes:
        o: [R, H, V].
        final_state: [S, H, K, V] float32.
        span_states: [M, H, K, V], the state before every span, for the backward pass.
        errors: [R, H, V], e, for the backward pass.
        decayed_state: [S, H, K, V], the part of the final state that was there before the last chunk, for the backward
            pass of a final state; unset for empty segments.
    """

    o: torch.Tensor
    final_state: torch.Tensor | None
    span_states: torch.Tensor | None
    errors: torch.Tensor | None
    decayed_state: torch.Tensor | None

    @classmethod
    def empty(
        cls, k: torch.Tensor, v: torch.Tensor, chunks: Chunks, output_final_state: bool, for_backward: bool
    ) -> RecurrenceResults:
        sizes = *k.shape[1:], v.shape[2]
        final_state = span_states = errors = decayed_state = None
        if output_final_state:
            final_state = k.new_empty(chunks.num_segments, *sizes, dtype=torch.float32)
        if for_backward:
            span_states = k.new_empty(chunks.num_span_slots, *sizes)
            errors = torch.empty_like(v)
            if output_final_state:
                decayed_state = torch.empty_like(final_state, dtype=k.dtype)
        return cls(torch.empty_like(v), final_state, span_states, errors, decayed_state)


@dataclass(frozen=True)
class ErrorRows:
    """What the gradients read of V columns a row, each [R, H, V] in q's type.

    Attributes:
        errors: e.
        d_errors: y; ``local_gradients`` overwrites it with the gradient of v.
        do: the gradient of o.
    """

    errors: torch.Tensor
    d_errors: torch.Tensor
    do: torch.Tensor


@dataclass(frozen=True)
class StateGradients:
    """The parts of dq and dk that come through the states, and the sums from which g's gradient follows.

    The sums are over parts of K; index 0 is for the states before the chunks (q * dq + k * dk of the rows that read
    them), index 1 for the states after the chunks (k * dk of the rows that were written to them).

    Attributes:
        dq: [R, H, K]; None until the states before the chunks were read.
        dk: [R, H, K].
        row_terms: [2, N, H, parts, C] float32, a row's sums.
        totals: [2, N, H, parts] float32, a chunk's sums.
    """

    dq: torch.Tensor | None
    dk: torch.Tensor
    row_terms: torch.Tensor
    totals: torch.Tensor

    @property
    def parts(self) -> int:
        return self.totals.shape[3]

    @classmethod
    def empty(cls, k: torch.Tensor, num_slots: int, chunk: int, parts: int) -> StateGradients:
        """For the states after the chunks, which come first."""
        dk = torch.empty_like(k)
        shape = 2, num_slots, k.shape[1], parts
        row_terms = torch.empty(*shape, chunk, dtype=torch.float32, device=k.device)
        return cls(None, dk, row_terms, torch.empty(shape, dtype=torch.float32, device=k.device))

    def with_dq(self, q: torch.Tensor) -> StateGradients:
        """The same tensors, and room for dq."""
        return StateGradients(torch.empty_like(q), self.dk, self.row_terms, self.totals)
