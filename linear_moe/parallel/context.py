"""Context parallelism: every rank holds a slice of each sequence, and passes states on to the ranks of later slices.

What crosses from slice to slice does not grow with the sequence's length. For all memories of every sequence (or of the
packed document that lies over the edge between two slices), it is the affine map of the state in float32, H K (K + V)
numbers, and the last W - 1 inputs of the convolutions. Every rank gathers the maps of all ranks and composes the maps
of the ranks before. In the backward pass, gradients come from the ranks after in the same way. No rank reads the first
rank's transition or the last rank's map, so that two ranks exchange H K V numbers and compute no transition.

Shape legend: ranks P, all memories A, segments of the plan S, segments that may cross an edge N, heads on this rank H,
key size K, value size V, convolution width W.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from linear_moe.parallel.collectives import Gather, gather
from linear_moe.parallel.streams import SecondStream
from megatron_patches.recomputed_regions import kept_value
from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.rules import MemoryRule, RuleInputs
from mom_layers.recur.state_passing import fold_gradients, fold_states, join_tails, last_inputs
from mom_layers.route.plan import RoutingPlan


@dataclass(frozen=True)
class Crossing:
    """The segments that may cross one edge of a slice, N of them.

    Attributes:
        segments: [N] int64, their numbers in the plan; None for all segments of the plan.
        starts, ends: [A, N / A] int32, the first row of each, and the row after its last.
        cu_seqlens: borders of a list of at most 2 N segments that contains the N segments. Computations for these N
            segments alone run over this list, so that their cost does not grow with the number of documents.
        places: the places of the N segments in that list.
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

    def incoming(self, plan: RoutingPlan) -> Crossing:
        """The segments that hold the slice's first tokens."""
        if self.documents is None:
            return self._all_segments(plan)
        segments, begins, ends = self._document_at(self.first, plan)
        return self._crossing(plan, segments, True, begins < self.first, ends > self.end)

    def outgoing(self, plan: RoutingPlan) -> Crossing:
        """The segments that hold the slice's last tokens."""
        if self.documents is None:
            return self._all_segments(plan)
        segments, begins, ends = self._document_at(self.end - 1, plan)
        return self._crossing(plan, segments, False, ends > self.end, begins < self.first)

    @staticmethod
    def _all_segments(plan: RoutingPlan) -> Crossing:
        starts, ends = (
            edges.unflatten(0, (plan.num_all_memories, -1)) for edges in (plan.cu_seqlens[:-1], plan.cu_seqlens[1:])
        )
        return Crossing(None, starts, ends, plan.cu_seqlens, slice(None))

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
        with torch.no_grad():
            if self._is_small(plan, rule, inputs):
                transition, before = kept_value(lambda: self._state_before(plan, rule, inputs, kernels))
            else:
                transition, before = self._state_before(plan, rule, inputs, kernels)
            state = self.incoming(plan).spread(before, plan)
        o, final_state = rule.recur(inputs, plan.cu_seqlens, state, torch.is_grad_enabled(), kernels)
        if final_state is None or not final_state.requires_grad:
            return o
        # Values and states cost memory: they are kept for the backward pass only where the rule needs them.
        kept = (None, None) if rule.linear_in_state else (inputs.v, before)
        return _FromLaterRanks.apply(
            o, final_state, transition, self, plan, rule, kernels, tuple(inputs.gates),
            *kept, inputs.q, inputs.k, *inputs.gates.values(),
        )  # fmt: skip

    def _is_small(self, plan: RoutingPlan, rule: MemoryRule, inputs: RuleInputs) -> bool:
        """Whether the states and transitions of the segments at an edge take no more memory than the values."""
        segments = plan.num_segments if self.documents is None else plan.num_all_memories
        keys, columns = rule.state_shape(inputs.k.shape[2], inputs.v.shape[2])
        size = segments * inputs.v.shape[1] * keys * (columns + (1 if rule.diagonal_transition else keys))
        return size * compute_dtype(inputs.k.dtype).itemsize <= inputs.v.numel() * inputs.v.element_size()

    def _state_before(self, plan, rule, inputs: RuleInputs, kernels):
        """This rank's transition, and the states [N, H, K, V] before the segments that hold the slice's first tokens.

        The states need two recurrences over the slice, or three, and an exchange. A recomputed region keeps what this
        returns, so that its second forward pass needs neither.
        """
        transition, contribution = self._own_map(plan, rule, inputs, kernels)
        transitions, contributions = self._exchange(transition, contribution)
        return transition, fold_states(transitions[: self.rank], contributions[: self.rank])[-1]

    def _own_map(self, plan, rule, inputs: RuleInputs, kernels):
        """Transition [N, H, K, K] ([N, H, K] if diagonal) and contribution [N, H, K, V] of the segments that continue
        on the next rank; zeros where no rank reads them."""
        k, v = inputs.k, inputs.v
        outgoing, dtype = self.outgoing(plan), compute_dtype(k.dtype)
        state_shape = rule.state_shape(k.shape[2], v.shape[2])
        shape = (outgoing.starts.numel(), v.shape[1], state_shape[0])
        in_the_middle = 0 < self.rank < self.size - 1
        # Both recurrences at once: with long sequences and few heads each leaves most of a GPU idle.
        second = SecondStream(k.device) if in_the_middle else None
        if in_the_middle:
            with second.beside():
                transition = rule.transition(inputs, outgoing.cu_seqlens, kernels)
                transition = _where(outgoing.through, transition[outgoing.places])
        else:
            transition = k.new_zeros((), dtype=dtype)
            transition = transition.expand(shape if rule.diagonal_transition else (*shape, shape[2]))
        if self.rank < self.size - 1:
            contribution = rule.recur(inputs, outgoing.cu_seqlens, None, True, kernels)[1]
            contribution = _where(outgoing.crosses, contribution[outgoing.places])
        else:
            contribution = k.new_zeros(*shape[:2], *state_shape, dtype=dtype)
        if in_the_middle:
            second.join(transition)
        return transition, contribution

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
    """Returns o. The backward pass supplies the final state's gradient, through the later ranks' outputs, before o's
    own backward pass runs: that gradient depends on the gradients of the ranks' initial states through each rank's own
    outputs alone, which wait for no other rank."""

    @staticmethod
    def forward(
        ctx, o, final_state, transition, context_slice, plan, rule, kernels, gate_names, v, state, q, k, *gates
    ):
        ctx.save_for_backward(transition, v, state, q, k, *gates)
        ctx.options = context_slice, plan, rule, kernels, gate_names
        return o.view_as(o)

    @staticmethod
    def backward(ctx, do):
        here, plan, rule, kernels, gate_names = ctx.options
        transition, v, state, q, k, *gates = (x if x is None else x.detach() for x in ctx.saved_tensors)
        incoming = here.incoming(plan)
        segments = incoming.cu_seqlens.shape[0] - 1
        state_shape = (segments, do.shape[1], *rule.state_shape(k.shape[2], do.shape[2]))
        if here.rank > 0:
            if state is not None:  # the incoming segments' states at their places in the list of segments
                state, before = k.new_zeros(state_shape, dtype=state.dtype), state
                state[incoming.places] = before
            inputs = RuleInputs(q, k, v, dict(zip(gate_names, gates, strict=True)))
            start = rule.gradient_of_initial_state(inputs, do, incoming.cu_seqlens, state, kernels)
        else:
            start = k.new_zeros(state_shape, dtype=transition.dtype)
        gradient = _where(incoming.crosses, start[incoming.places])
        transitions, gradients = here._exchange(transition, gradient)
        d_final_state = None
        if here.rank < here.size - 1:
            later = slice(here.rank + 1, None)
            d_final_state = fold_gradients(transitions[later], gradients[later])[0]
            d_final_state = here.outgoing(plan).spread(d_final_state, plan)
        return do, d_final_state, *[None] * (len(gate_names) + 10)
