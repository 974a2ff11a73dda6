"""Context parallelism: every rank holds a slice of each sequence, and passes states on to the ranks of later slices.

The numbers that cross from slice to slice do not grow with the sequence's length: for all memories of every sequence
(or of the packed document that lies over the edge between two slices), the affine map of the state in float32, H K (K +
V) numbers, and the last W - 1 inputs of the convolutions. Every rank gathers the maps of all ranks and composes the
maps of the ranks before. In the backward pass, gradients come from the ranks after in the same way. No rank reads the
first rank's transition or the last rank's map, so that two ranks exchange H K V numbers and compute no transition.

Shape legend: ranks P, all memories A, segments of the plan S, segments that may cross an edge N, heads on this rank H,
key size K, value size V, convolution width W, parts of a slice J.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from linear_moe.parallel.collectives import Gather, gather
from linear_moe.parallel.streams import SecondStream
from megatron_patches.recomputed_regions import kept_value
from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules import MemoryRule, RuleInputs
from mom_layers.recur.state_passing import compose, fold_gradients, fold_states, join_tails, last_inputs
from mom_layers.route.plan import RoutingPlan

# States, of all segments, parts and heads, with which the recurrences fill a GPU: Hopper's take their widest tiles from
# 67 on. Rows that a part has at least, on average: with fewer, states and transitions cost more than parts save.
FILLING, SHORTEST = 64, 1024


@dataclass(frozen=True)
class Crossing:
    """The segments that may cross one edge of a slice, N of them.

    Attributes:
        segments: [N] int64, their numbers in the plan; None for all segments of the plan.
        starts, ends: [A, N / A] int32, the first row of each, and the row after its last.
        cu_seqlens: borders of a list of at most 2 N segments that contains the N segments. Computations for these N
            segments alone run over this list, so that their cost does not grow with the number of documents. Without
            documents, the list of the N J parts of the segments.
        places: the places of the N segments, or of their parts, in that list.
        crosses: [1] bool, whether the segments cross the edge; None where they do, or where no rank is beyond the edge.
        through: [1] bool, whether the segments cross the other edge of the slice too; None where they do.
    """

    segments: torch.Tensor | None
    starts: torch.Tensor
    ends: torch.Tensor
    cu_seqlens: torch.Tensor
    places: slice
    crosses: torch.Tensor | None = None
    through: torch.Tensor | None = None

    def spread(self, x: torch.Tensor, plan: RoutingPlan) -> torch.Tensor:
        """x [N, ...] over the plan's segments [S, ...], zeros elsewhere."""
        if self.segments is None:
            return x
        return x.new_zeros(plan.num_segments, *x.shape[1:]).index_copy(0, self.segments, x)


class Maps(NamedTuple):
    """Transitions, [N, H, K, K] or [N, H, K] if diagonal.

    Attributes:
        of_slice: of this rank's slice.
        of_parts: [J, ...] of its parts; None where the slice is one part.
    """

    of_slice: torch.Tensor
    of_parts: torch.Tensor | None


def _in_parts(cu_seqlens: torch.Tensor, parts: int) -> torch.Tensor:
    """Borders [S J + 1] of segments that are cut into J parts of whole chunks; the last parts of short ones are empty.

    Args:
        cu_seqlens: [S + 1].
    """
    if parts == 1:
        return cu_seqlens
    starts, lengths = cu_seqlens[:-1, None], cu_seqlens.diff()[:, None]
    step = (lengths + (parts * CHUNK - 1)) // (parts * CHUNK) * CHUNK
    before = step * torch.arange(parts, dtype=torch.int32, device=cu_seqlens.device)
    return torch.cat([(starts + torch.minimum(before, lengths)).flatten(), cu_seqlens[-1:]])


def _by_part(x: torch.Tensor, parts: int) -> torch.Tensor:
    """[N J, ...], the parts of a segment side by side, to [J, N, ...]."""
    return x.unflatten(0, (-1, parts)).transpose(0, 1)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    """[J, N, ...] to [N J, ...], the inverse of :func:`_by_part`."""
    return x.transpose(0, 1).flatten(0, 1)


def _where(condition: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x if condition is None else torch.where(condition, x, 0)


class ContextSlice:
    """A rank's slice of sequences that are cut over a process group; rank 0 holds the earliest tokens.

    Implements :class:`mom_layers.mixing.SequenceSlice`.

    Args:
        group: the context-parallel group.
        length: tokens of a sequence on each rank.
        documents: [B + 1] int32 borders of packed documents in the whole row of P * length tokens. When absent, every
            sequence runs from the first token of the first rank to the last token of the last rank.
    """

    def __init__(self, group: torch.distributed.ProcessGroup, length: int, documents: torch.Tensor | None = None):
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.first, self.end, self.documents = group.rank() * length, (group.rank() + 1) * length, documents

    def local_documents(self) -> torch.Tensor:
        """Borders [B + 1] of the documents within this slice; documents in other slices are empty."""
        return self.documents.clamp(self.first, self.end) - self.first

    def incoming(self, plan: RoutingPlan, parts: int = 1) -> Crossing:
        """The segments that hold the slice's first tokens; their recurrences run over J parts of each."""
        if self.documents is None:
            return self._all_segments(plan, parts)
        segments, begins, ends = self._document_at(self.first, plan)
        return self._crossing(plan, segments, True, begins < self.first, ends > self.end)

    def outgoing(self, plan: RoutingPlan, parts: int = 1) -> Crossing:
        """The segments that hold the slice's last tokens; their recurrences run over J parts of each."""
        if self.documents is None:
            return self._all_segments(plan, parts)
        segments, begins, ends = self._document_at(self.end - 1, plan)
        return self._crossing(plan, segments, False, ends > self.end, begins < self.first)

    @staticmethod
    def _all_segments(plan: RoutingPlan, parts: int) -> Crossing:
        starts, ends = (
            edges.unflatten(0, (plan.num_all_memories, -1)) for edges in (plan.cu_seqlens[:-1], plan.cu_seqlens[1:])
        )
        return Crossing(None, starts, ends, _in_parts(plan.cu_seqlens, parts), slice(None))

    def _document_at(self, token: int, plan: RoutingPlan):
        """The segments of the document that contains a token of the whole row, and the document's borders, [1] each."""
        at = torch.full((1,), token, dtype=torch.int32, device=self.documents.device)
        document = torch.searchsorted(self.documents, at, right=True) - 1
        segments = torch.arange(plan.num_all_memories, device=at.device) * plan.num_sequences + document
        return segments, self.documents[document], self.documents[document + 1]

    @staticmethod
    def _crossing(plan, segments, incoming, crosses, crosses_other_edge) -> Crossing:
        # The documents before the incoming document and after the outgoing document are empty in this slice. So the
        # incoming document has the first rows of every memory, and the outgoing document the last rows.
        starts, ends = plan.cu_seqlens[segments], plan.cu_seqlens[segments + 1]
        memories = plan.cu_seqlens[:: plan.num_sequences]
        borders = torch.stack([memories[:-1], ends if incoming else starts], dim=1)
        return Crossing(
            segments,
            starts[:, None],
            ends[:, None],
            torch.cat([borders.flatten(), memories[-1:]]),
            slice(0 if incoming else 1, None, 2),
            crosses,
            crosses & crosses_other_edge,
        )

    def tails(
        self, plan: RoutingPlan, inputs: Sequence[torch.Tensor], gathered: Sequence[bool], width: int
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See :meth:`mom_layers.mixing.SequenceSlice.tails`."""
        outgoing = self.outgoing(plan)
        passed, own = [], []
        for x, by_token in zip(inputs, gathered, strict=True):
            tokens = plan.token_of_row if by_token else None
            x, tail = last_inputs(x, outgoing.starts, outgoing.ends, width, tokens)
            passed.append(x)
            own.append(_where(outgoing.crosses, tail))
        counts = (outgoing.ends - outgoing.starts).flatten().clamp(max=width - 1)
        if outgoing.through is not None:  # a document that begins or ends here hides the slices before
            counts = torch.where(outgoing.through, counts, width - 1)
        # A count is at most W - 1, exact in every type: it is sent as one more channel.
        counts = counts.to(own[0].dtype)[:, None, None].expand(-1, width - 1, 1)
        everywhere = Gather.apply(torch.cat([*own, counts], dim=-1), self.group)
        earlier = everywhere.unflatten(0, (self.size, -1))[: self.rank]
        tails = join_tails(earlier[..., :-1], earlier[:, :, 0, -1].detach().long())
        tails = self.incoming(plan).spread(tails, plan).split([x.shape[1] for x in inputs], dim=-1)
        return passed, [tail.contiguous() for tail in tails]

    def recur(self, plan: RoutingPlan, rule: MemoryRule, inputs: RuleInputs, kernels: str) -> torch.Tensor:
        """See :meth:`mom_layers.mixing.SequenceSlice.recur`."""
        parts = self._num_parts(plan, rule, inputs)
        with torch.no_grad():
            if self._is_small(plan, rule, inputs, parts):
                maps, states = kept_value(lambda: self._states_before(plan, rule, inputs, kernels, parts))
            else:
                maps, states = self._states_before(plan, rule, inputs, kernels, parts)
            state = self.incoming(plan, parts).spread(_side_by_side(states), plan)
        cu_seqlens = _in_parts(plan.cu_seqlens, parts)
        o, final_state = rule.recur(inputs, cu_seqlens, state, torch.is_grad_enabled(), kernels)
        if final_state is None or not final_state.requires_grad:
            return o
        # Values and states cost memory: they are kept for the backward pass only where the rule needs them.
        kept = (None, None) if rule.linear_in_state else (inputs.v, states)
        return _FromLaterRanks.apply(
            o, final_state, maps.of_slice, maps.of_parts, self, plan, rule, kernels, parts, tuple(inputs.gates),
            *kept, inputs.q, inputs.k, *inputs.gates.values(),
        )  # fmt: skip

    def _num_parts(self, plan: RoutingPlan, rule: MemoryRule, inputs: RuleInputs) -> int:
        """Into how many parts the slice of a sequence is cut, whose recurrences run side by side.

        Packed documents are not cut, nor the rules whose kernels cut long segments themselves. The number follows from
        shapes.
        """
        parts, heads = 1, inputs.v.shape[1]
        if self.documents is not None or rule.family in ("", "scalar_decay"):
            return parts
        while plan.num_segments * heads * parts < FILLING and plan.num_rows >= 2 * parts * plan.num_segments * SHORTEST:
            parts *= 2
        return parts

    def _is_small(self, plan: RoutingPlan, rule: MemoryRule, inputs: RuleInputs, parts: int) -> bool:
        """Whether the states and transitions that a slice has take no more memory than its values."""
        segments = plan.num_segments if self.documents is None else plan.num_all_memories
        keys, columns = rule.state_shape(inputs.k.shape[2], inputs.v.shape[2])
        columns = parts * columns + (parts + (parts > 1)) * (1 if rule.diagonal_transition else keys)
        size = segments * inputs.v.shape[1] * keys * columns
        return size * compute_dtype(inputs.k.dtype).itemsize <= inputs.v.numel() * inputs.v.element_size()

    def _states_before(self, plan, rule, inputs: RuleInputs, kernels, parts: int) -> tuple[Maps, torch.Tensor]:
        """This rank's transitions, and the states [J, N, H, K, V] before the parts of the slice.

        The states need two recurrences over the slice, or three, and an exchange. A recomputed region keeps what this
        returns, so that its second forward pass needs neither.
        """
        transitions, contributions = self._own_maps(plan, rule, inputs, kernels, parts)
        transition = compose(transitions)
        contribution = fold_states(transitions, contributions)[-1] if parts > 1 else contributions[0]
        of_all = self._exchange(transition, _where(self.outgoing(plan).crosses, contribution))
        before = fold_states(*(of_rank[: self.rank] for of_rank in of_all))[-1]
        if parts == 1:
            return Maps(transition, None), before[None]
        states = fold_states(transitions[:-1], contributions[:-1], before)
        return Maps(transition, transitions), torch.stack(states)

    def _own_maps(self, plan, rule, inputs: RuleInputs, kernels, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Transitions [J, N, H, K, K] ([J, N, H, K] if diagonal) and contributions [J, N, H, K, V] of the parts of the
        segments that continue on the next rank; zeros where no rank reads them."""
        k, v = inputs.k, inputs.v
        outgoing, dtype = self.outgoing(plan, parts), compute_dtype(k.dtype)
        state_shape = rule.state_shape(k.shape[2], v.shape[2])
        shape = (parts, outgoing.starts.numel(), v.shape[1], state_shape[0])
        with_transition = parts > 1 or 0 < self.rank < self.size - 1
        # Both recurrences at once: with long sequences and few heads each leaves most of a GPU idle.
        second = SecondStream(k.device) if with_transition else None
        if with_transition:
            with second.beside():
                transitions = rule.transition(inputs, outgoing.cu_seqlens, kernels)
                transitions = _where(outgoing.through, _by_part(transitions[outgoing.places], parts))
        else:
            transitions = k.new_zeros((), dtype=dtype)
            transitions = transitions.expand(shape if rule.diagonal_transition else (*shape, shape[3]))
        if parts > 1 or self.rank < self.size - 1:
            contributions = rule.recur(inputs, outgoing.cu_seqlens, None, True, kernels)[1]
            contributions = _by_part(contributions[outgoing.places], parts)
        else:
            contributions = k.new_zeros(*shape[:3], *state_shape, dtype=dtype)
        if with_transition:
            second.join(transitions)
        return transitions, contributions

    def _exchange(self, transition: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gathers every rank's transition [P, N, H, K, K] (or [P, N, H, K]) and vectors [P, N, H, K, V] together."""
        diagonal = transition.dim() < vectors.dim()
        if self.size == 2:  # no rank lies between the two, so that no transition is read
            return transition.new_zeros(2, *transition.shape), _gather(vectors, self.group)
        maps = _gather(torch.cat([vectors, transition[..., None] if diagonal else transition], dim=-1), self.group)
        vectors, transitions = maps.split([vectors.shape[-1], maps.shape[-1] - vectors.shape[-1]], dim=-1)
        return transitions.squeeze(-1) if diagonal else transitions, vectors


def _gather(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Returns x of every rank, [P, ...]."""
    return gather(x, group).unflatten(0, (group.size(), -1))


class _FromLaterRanks(torch.autograd.Function):
    """Returns o. The backward pass supplies the final states' gradients, through later parts and the later ranks'
    outputs, before o's own backward pass runs: these gradients depend on the gradients of the initial states through
    each part's own outputs alone, which wait for no other rank."""

    @staticmethod
    def forward(
        ctx, o, final_state, transition, of_parts, context_slice, plan, rule, kernels, parts, gate_names,
        v, states, q, k, *gates,
    ):  # fmt: skip
        ctx.save_for_backward(transition, of_parts, v, states, q, k, *gates)
        ctx.options = context_slice, plan, rule, kernels, parts, gate_names
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        here, plan, rule, kernels, parts, gate_names = ctx.options
        transition, of_parts, v, states, q, k, *gates = (x if x is None else x.detach() for x in ctx.saved_tensors)
        incoming = here.incoming(plan, parts)
        state_shape = (
            incoming.cu_seqlens.shape[0] - 1, do.shape[1], *rule.state_shape(k.shape[2], do.shape[2])
        )  # fmt: skip
        if here.rank > 0 or parts > 1:
            state = None
            if states is not None:  # the incoming segments' states at their places in the list of segments
                state = k.new_zeros(state_shape, dtype=states.dtype)
                state[incoming.places] = _side_by_side(states)
            inputs = RuleInputs(q, k, v, dict(zip(gate_names, gates, strict=True)))
            start = rule.gradient_of_initial_state(inputs, do, incoming.cu_seqlens, state, kernels)
        else:
            start = k.new_zeros(state_shape, dtype=transition.dtype)
        starts = _by_part(start[incoming.places], parts)
        first = starts[0] if of_parts is None else fold_gradients(of_parts, starts)[0]
        transitions, gradients = here._exchange(transition, _where(incoming.crosses, first))
        d_final_state = None
        if here.rank < here.size - 1:
            later = slice(here.rank + 1, None)
            d_final_state = fold_gradients(transitions[later], gradients[later])[0]
        if of_parts is not None:  # the last part's final state is the slice's
            d_final_state = torch.stack(fold_gradients(of_parts, starts, d_final_state)[1:])
            d_final_state = _side_by_side(d_final_state)
        elif d_final_state is not None:
            d_final_state = here.outgoing(plan).spread(d_final_state, plan)
        return do, d_final_state, *[None] * (len(gate_names) + 12)
