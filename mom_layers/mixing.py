"""Tokens through the memories: the one forward that training, evaluation, prefill and decoding share.

Shape legend: tokens N, rows R, segments S, groups G (memories and the shared one), heads H, key size K, value size V,
hidden size D, convolution width W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mom_layers.combine.operation import combine
from mom_layers.convolve.operation import segment_convolution
from mom_layers.convolve.qkv import convolve_qkv
from mom_layers.project.operation import grouped_projection
from mom_layers.recur.rules import MemoryRule
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.rows import gather_rows
from mom_layers.state import MemoryState


@dataclass(frozen=True)
class MemoryParameters:
    """The weights that act on rows, for the heads that are here (all of them, or one tensor-parallel rank's).

    Attributes:
        rule: the update rule.
        projection: [G, O, D] with O = H K + H V + H * (gates' widths): keys, values and gates of each memory in
            one matrix, in this order; [1, O, D] where all memories share one.
        q_conv, k_conv: [H K, W]. v_conv: [H V, W].
        rule_parameters: the rule's own, [H, ...] each.
        norm_weight: [V].
        num_heads: H.
        norm_eps: of the output norm.
    """

    rule: MemoryRule
    projection: torch.Tensor
    q_conv: torch.Tensor
    k_conv: torch.Tensor
    v_conv: torch.Tensor
    rule_parameters: Mapping[str, torch.Tensor]
    norm_weight: torch.Tensor
    num_heads: int
    norm_eps: float = 1e-6


class SequenceSlice(Protocol):
    """Where the tokens here are a slice of longer sequences: gets what crosses its edges from whoever has the rest."""

    def tails(
        self, plan: RoutingPlan, inputs: Sequence[torch.Tensor], gathered: Sequence[bool], width: int
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The inputs of convolutions before every segment.

        Args:
            inputs: [R, C] rows, or [N, C] tokens where ``gathered`` says so; any number of them.
            width: W.

        Returns:
            the inputs, to be used in place of the arguments, and the initial tails [S, W - 1, C].
        """
        ...

    def recur(self, plan: RoutingPlan, rule: MemoryRule, q, k, v, gates, kernels: str) -> torch.Tensor:
        """What ``rule.recur`` reads, o [R, H, V], with states that go on from slice to slice."""
        ...


def projection_sizes(rule: MemoryRule, num_heads: int, head_dim: int, value_dim: int) -> list[int]:
    """Widths of the pieces of one memory's fused projection: keys, values, then each gate of the rule."""
    return [num_heads * width for width in (head_dim, value_dim, *rule.gate_widths.values())]


def read_memories(
    x: torch.Tensor,
    q: torch.Tensor,
    plan: RoutingPlan,
    parameters: MemoryParameters,
    *,
    state: MemoryState | None = None,
    output_state: bool = False,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """Projects, convolves and runs every memory's recurrence; arguments as of :func:`mix_memories`.

    Returns:
        o [R, H, V], what every row reads from its memory, and the new state or None.
    """
    rule, heads = parameters.rule, parameters.num_heads
    k_dim = q.shape[1] // heads
    v_dim = parameters.v_conv.shape[0] // heads
    sizes = projection_sizes(rule, heads, k_dim, v_dim)
    one_projection = parameters.projection.shape[0] == 1 and plan.num_all_memories > 1
    if one_projection:  # the same for every memory: project tokens, and gather them by row afterwards
        projected = torch.nn.functional.linear(x, parameters.projection[0])
    else:
        projected = grouped_projection(x, parameters.projection, plan, kernels=kernels)
    unit = heads if rule.unit_length_keys else None
    tails = (None, None, None)
    initial_state = None
    if state is not None:
        tails = tuple(plan.to_segments(tail) for tail in (state.q_tail, state.k_tail, state.v_tail))
        initial_state = plan.to_segments(state.recurrent)
    if sequence_slice is not None:
        if state is not None or output_state:
            given = "a state" if state is not None else "output_state=True"
            raise ValueError(f"a slice of longer sequences gets its state from those who hold the rest: got {given}")
        width = parameters.q_conv.shape[1]
        (q, projected), (q_tail, tail) = sequence_slice.tails(plan, (q, projected), (True, one_projection), width)
        tails = (q_tail, *tail.tensor_split((sizes[0], sizes[0] + sizes[1]), dim=-1)[:2])

    if one_projection:
        k, v, raw = projected.split((sizes[0], sizes[1], sum(sizes[2:])), dim=1)
        raw = gather_rows(raw, plan, kernels=kernels)
        options = {"gather": True, "output_tail": output_state, "kernels": kernels}
        q, q_tail = segment_convolution(
            q, parameters.q_conv, plan, unit_length_heads=unit, initial_tail=tails[0], **options
        )
        k, k_tail = segment_convolution(
            k, parameters.k_conv, plan, unit_length_heads=unit, initial_tail=tails[1], **options
        )
        v, v_tail = segment_convolution(v, parameters.v_conv, plan, initial_tail=tails[2], **options)
    else:
        q, k, v, raw, (q_tail, k_tail, v_tail) = convolve_qkv(
            q, projected, parameters.q_conv, parameters.k_conv, parameters.v_conv, plan,
            unit_length_heads=unit, tails=tails, output_tail=output_state, kernels=kernels,
        )  # fmt: skip
    raw_gates = raw[:, : sum(sizes[2:])].split(sizes[2:], dim=1)
    gates = rule.gates(dict(zip(rule.gate_widths, raw_gates, strict=True)), parameters.rule_parameters, kernels)
    q, k, v = (rows.unflatten(1, (heads, -1)) for rows in (q, k, v))
    if sequence_slice is not None:
        return sequence_slice.recur(plan, rule, q, k, v, gates, kernels), None
    o, recurrent = rule.recur(q, k, v, plan.cu_seqlens, gates, initial_state, output_state, kernels)
    new_state = None
    if output_state:
        new_state = MemoryState(*(plan.from_segments(part) for part in (recurrent, q_tail, k_tail, v_tail)))
    return o, new_state


def mix_memories(
    x: torch.Tensor,
    q: torch.Tensor,
    gate: torch.Tensor | Callable[[], torch.Tensor],
    weights: torch.Tensor,
    plan: RoutingPlan,
    parameters: MemoryParameters,
    *,
    state: MemoryState | None = None,
    output_state: bool = False,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """Projects, convolves, runs every memory's recurrence, and mixes what the memories answer.

    Args:
        x: [N, D] tokens, in the plan's order.
        q: [N, H K] queries before convolution, one per token for all its memories.
        gate: [N, H V] output gate before SiLU; or a function that gives it, called after the recurrence, so that
            backward is done with it, and has freed it, when the recurrence's begins.
        weights: [N, k] the router's.
        plan: where each (token, memory) row lies.
        parameters: weights of the heads that are here.
        state: what earlier calls left, for the plan's sequences.
        output_state: also return the state after the last token.
        sequence_slice: where others hold the rest of the sequences; without ``state`` and ``output_state``.

    Returns:
        y [N, H V] before the output projection, and the new state or None.
    """
    o, new_state = read_memories(
        x, q, plan, parameters,
        state=state, output_state=output_state, sequence_slice=sequence_slice, kernels=kernels,
    )  # fmt: skip
    gate = gate() if callable(gate) else gate
    y = combine(
        o, weights, plan.row_of_choice, gate.unflatten(1, o.shape[1:]), parameters.norm_weight,
        eps=parameters.norm_eps, kernels=kernels,
    )  # fmt: skip
    return y.flatten(1), new_state
