"""Tokens through the memories: the only place that puts a layer's operations together.

    mix_tokens      a whole layer, from tokens to tokens, for training, evaluation and prefill
    step_tokens     a whole layer for one new token of every sequence
    mix_routed      the part after a router of the caller's: plan, memories, mixing (Megatron's layer enters here)
    mix_memories    the part after the routing plan
    run_rule        the part after the convolutions (a layer of one memory alone enters here)
    read_memories   what every row reads from its memory (expert parallelism enters here and at project_rows)
    project_rows    the part of read_memories before run_rule

Shape legend: sequences B, tokens N, rows R, segments S, all memories A (routed and shared), heads H, key size K, value
size V, hidden size D, convolution width W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from mom_layers.combine.operation import combine
from mom_layers.common import checks
from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.convolve.operation import UNIT_LENGTH_EPS, segment_convolution
from mom_layers.convolve.qkv import convolve_qkv
from mom_layers.convolve.text import convolve_next_token, convolve_text
from mom_layers.project.operation import grouped_projection
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules import MemoryRule, RuleInputs
from mom_layers.route.plan import RoutingPlan, build_routing_plan
from mom_layers.route.router import route
from mom_layers.route.rows import gather_rows
from mom_layers.route.sequences import plan_sequences
from mom_layers.route.spare_rows import zero_spare_gradients
from mom_layers.settings import MixerSettings
from mom_layers.state import MemoryState


@dataclass(frozen=True)
class TokenMaps:
    """The linear maps of a layer that act on tokens. The maps are called, so that hooks and adapters take effect.

    Attributes:
        query: [N, D] -> [N, H K], queries before the convolution.
        output_gate: [N, D] -> [N, H V], the output gate before SiLU.
        out: [N, H V] -> [N, D], the output projection.
        text_conv: [D, W'], filters of a convolution over the text, before the router and the maps; None without.
    """

    query: Callable[[torch.Tensor], torch.Tensor]
    output_gate: Callable[[torch.Tensor], torch.Tensor]
    out: Callable[[torch.Tensor], torch.Tensor]
    text_conv: torch.Tensor | None = None


@dataclass(frozen=True)
class MemoryParameters:
    """The weights that act on rows, for the heads of this rank (all heads without tensor parallelism).

    Attributes:
        settings: sizes and choices of the layer, with H the heads of this rank.
        projection: [A, O, D] with O = H K + H V + H * (columns of the raw gates): keys, values and raw gates of each
            memory in one matrix, in this order; [1, O, D] where all memories share one projection. Or a function that
            projects tokens [N, D] to [A, N, O] (or [1, N, O]), for modules that must be called. None in a layer of one
            memory alone, whose caller projects.
        q_conv, k_conv: [H K, W]. v_conv: [H V, W]. Ones with W = 1 stand for no convolution.
        rule_parameters: the rule's own parameters, [H, ...] each.
        norm_weight: [V].
    """

    settings: MixerSettings
    projection: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None
    q_conv: torch.Tensor
    k_conv: torch.Tensor
    v_conv: torch.Tensor
    rule_parameters: Mapping[str, torch.Tensor]
    norm_weight: torch.Tensor

    @property
    def rule(self) -> MemoryRule:
        """The memory update rule."""
        return self.settings.update_rule

    @property
    def num_heads(self) -> int:
        """Heads of this rank."""
        return self.settings.num_heads


class SequenceSlice(Protocol):
    """Supplies the boundary states when this rank holds only a part, a slice, of each sequence."""

    def tails(
        self, plan: RoutingPlan, inputs: Sequence[torch.Tensor], gathered: Sequence[bool], width: int
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """The inputs of convolutions before every segment.

        Args:
            inputs: [R, C] rows, or [N, C] tokens where ``gathered`` says so; any number of tensors.
            width: W.

        Returns:
            the inputs, which the caller uses in place of its arguments, and the initial tails [S, W - 1, C].
        """
        ...

    def recur(self, plan: RoutingPlan, rule: MemoryRule, inputs: RuleInputs, kernels: str) -> torch.Tensor:
        """The outputs o [R, H, V] of ``rule.recur``, with states that go on from slice to slice."""
        ...


def mix_tokens(
    x: torch.Tensor,
    router: Callable[[torch.Tensor], torch.Tensor],
    maps: TokenMaps,
    parameters: MemoryParameters,
    cu_seqlens: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    state: MemoryState | None = None,
    output_state: bool = False,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None, torch.Tensor]:
    """A whole layer: routes tokens, runs the memories, mixes their outputs, projects the result.

    Args:
        x: [B, T, D].
        router: [N, D] -> [N, M] logits.
        maps, parameters: the layer's.
        cu_seqlens: [sequences + 1] int32, first of the B T tokens of every sequence, then their number.
        token_mask: [B, T] bool, False at padding. Padding reaches no memory, and its outputs are zero.
        state: what earlier calls left for these sequences.
        output_state: also return the state after the last token.

    Returns:
        out [B, T, D], the new state or None, and the router's logits [B T, M].
    """
    if token_mask is not None:
        # Padding may hold anything, NaN too, which a product with zero would keep.
        x = x.masked_fill(~token_mask[..., None], 0)
    tokens, mask = x.flatten(0, 1), None if token_mask is None else token_mask.flatten()
    if maps.text_conv is not None:
        plan = plan_sequences(cu_seqlens, tokens.shape[0], token_mask=mask, kernels=kernels)
        tokens, text_tail = convolve_text(
            tokens, maps.text_conv, plan,
            tail=None if state is None else state.text_tail, output_tail=output_state, kernels=kernels,
        )  # fmt: skip
    logits = router(tokens)
    weights, ids = route(logits, parameters.settings.topk, kernels=kernels)
    y, new_state = mix_routed(
        tokens, maps.query(tokens), partial(maps.output_gate, tokens), weights, ids, cu_seqlens, parameters,
        token_mask=mask, state=state, output_state=output_state, kernels=kernels,
    )  # fmt: skip
    if maps.text_conv is not None and output_state:
        new_state = replace(new_state, text_tail=text_tail)
    out = maps.out(y).unflatten(0, x.shape[:2])
    if token_mask is not None:
        out = out.masked_fill(~token_mask[..., None], 0)
    return out, new_state, logits


def has_step(rule: MemoryRule, kernels: str, x: torch.Tensor) -> bool:
    """Whether :func:`step_tokens` decodes tokens such as x [B, D] with this rule."""
    return resolve_kernels(kernels, x) == "triton" and rule.decode_step is not None


def step_tokens(
    x: torch.Tensor,
    router: Callable[[torch.Tensor], torch.Tensor],
    maps: TokenMaps,
    parameters: MemoryParameters,
    state: MemoryState,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole layer for one new token of every sequence, in few launches; changes ``state`` in place.

    Reads and writes only the memories that a token goes to. No gradients. A CUDA graph can hold the step.

    Args:
        x: [B, D].
        router, maps, parameters: as for :func:`mix_tokens`; :func:`has_step` must hold.
        state: the layer's state of the B sequences.

    Returns:
        out [B, D] and the router's logits [B, M].
    """
    if maps.text_conv is not None:
        x = convolve_next_token(x, maps.text_conv, state.text_tail)
    logits, settings = router(x), parameters.settings
    y = parameters.rule.decode_step(
        x.contiguous(), maps.query(x), maps.output_gate(x), logits, parameters, state,
        settings.topk, settings.shared_memory, UNIT_LENGTH_EPS,
    )  # fmt: skip
    return maps.out(y), logits


def mix_routed(
    x: torch.Tensor,
    q: torch.Tensor,
    output_gate: torch.Tensor | Callable[[], torch.Tensor],
    weights: torch.Tensor,
    ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    parameters: MemoryParameters,
    *,
    token_mask: torch.Tensor | None = None,
    time_major: bool = False,
    state: MemoryState | None = None,
    output_state: bool = False,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """Sorts tokens into rows by the router's choices, then :func:`mix_memories`.

    Args:
        x: [N, D] tokens.
        weights, ids: [N, k], the router's; ids sequence by sequence, whatever ``time_major`` says.
        cu_seqlens: [B + 1] int32, first token of every sequence, then N.
        token_mask: [N] bool, False at padding.
        time_major: x, q, output_gate, weights and the result are stored time first, [T, B] flattened.
    """
    settings = parameters.settings
    plan = build_routing_plan(
        ids, cu_seqlens,
        num_memories=settings.num_memories, shared=settings.shared_memory, token_mask=token_mask, kernels=kernels,
    )  # fmt: skip
    return mix_memories(
        x, q, output_gate, weights, plan.time_major() if time_major else plan, parameters,
        state=state, output_state=output_state, sequence_slice=sequence_slice, kernels=kernels,
    )  # fmt: skip


def mix_memories(
    x: torch.Tensor,
    q: torch.Tensor,
    output_gate: torch.Tensor | Callable[[], torch.Tensor],
    weights: torch.Tensor,
    plan: RoutingPlan,
    parameters: MemoryParameters,
    *,
    state: MemoryState | None = None,
    output_state: bool = False,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """Projects, convolves, runs every memory's recurrence, and mixes the memories' outputs.

    Args:
        x: [N, D] tokens, in the plan's order.
        q: [N, H K] queries before convolution, a token's for all its memories.
        output_gate: [N, H V] before SiLU; or a function that returns the gate. The function is called after the
            recurrence, so that the backward pass has freed the gate when the recurrence's backward pass begins.
        weights: [N, k], the router's.
        plan: where each (token, memory) row lies.
        parameters: weights of the heads that are here.
        state: what earlier calls left, for the plan's sequences.
        output_state: also return the state after the last token.
        sequence_slice: given where other ranks hold the rest of the sequences; excludes ``state`` and ``output_state``.

    Returns:
        y [N, H V] before the output projection, and the new state or None.
    """
    o, new_state = read_memories(
        x, q, plan, parameters,
        state=state, output_state=output_state, sequence_slice=sequence_slice, kernels=kernels,
    )  # fmt: skip
    output_gate = output_gate() if callable(output_gate) else output_gate
    y = combine(
        o, weights, plan.row_of_choice, output_gate.unflatten(1, o.shape[1:]), parameters.norm_weight,
        eps=parameters.settings.norm_eps, kernels=kernels,
    )  # fmt: skip
    return y.flatten(1), new_state


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
    """Projects, convolves and runs every memory's recurrence; arguments as for :func:`mix_memories`.

    Returns:
        o [R, H, V], what every row reads from its memory, and the new state or None.

    o is undefined in spare rows, whose gradient must be zero: no token reads spare rows.

    Raises:
        ValueError: ``sequence_slice`` together with ``state`` or ``output_state``.
    """
    check_states(sequence_slice, state, output_state)
    rows, tails = project_rows(
        x, q, plan, parameters,
        state=state, output_state=output_state, sequence_slice=sequence_slice, kernels=kernels,
    )  # fmt: skip
    return run_rule(rows, tails, plan, parameters, state, output_state, sequence_slice, kernels)


def project_rows(
    x: torch.Tensor,
    q: torch.Tensor,
    plan: RoutingPlan,
    parameters: MemoryParameters,
    *,
    state: MemoryState | None = None,
    output_state: bool = False,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor | None, ...]]:
    """Projects tokens to rows and convolves these; arguments as for :func:`mix_memories`.

    Returns:
        q, k, v and the raw gates of every row, and the convolutions' last inputs: what :func:`run_rule` takes.
    """
    rule, heads = parameters.rule, parameters.num_heads
    key_heads = rule.num_key_heads(heads)
    sizes = rule.projection_sizes(heads, q.shape[1] // key_heads, parameters.v_conv.shape[0] // heads)

    # k, v, raw gates: of every row, in one grouped product; or of every token, where all memories share one projection.
    projected, by_token = _project(x, plan, parameters.projection, kernels)

    # What lies before each segment: nothing, what an earlier call left, or what other ranks hold.
    tails, width = tails_before(plan, state), parameters.q_conv.shape[1]
    if sequence_slice is not None and width > 1:
        (q, projected), (q_tail, tail) = sequence_slice.tails(plan, (q, projected), (True, by_token), width)
        tails = (q_tail, *tail.tensor_split((sizes[0], sizes[0] + sizes[1]), dim=-1)[:2])

    # q, k = unit length (SiLU(conv)), v = SiLU(conv)
    unit = key_heads if rule.unit_length_keys else None
    if by_token:
        k, v, raw = projected.split((sizes[0], sizes[1], sum(sizes[2:])), dim=1)
        raw = gather_rows(raw, plan, kernels=kernels)
        options = {"gather": True, "output_tail": output_state, "kernels": kernels}
        unit_length = options | {"unit_length_heads": unit}
        q, q_tail = segment_convolution(q, parameters.q_conv, plan, initial_tail=tails[0], **unit_length)
        k, k_tail = segment_convolution(k, parameters.k_conv, plan, initial_tail=tails[1], **unit_length)
        v, v_tail = segment_convolution(v, parameters.v_conv, plan, initial_tail=tails[2], **options)
        tails = (q_tail, k_tail, v_tail)
    else:
        q, k, v, raw, tails = convolve_qkv(
            q, projected, parameters.q_conv, parameters.k_conv, parameters.v_conv, plan,
            unit_length_heads=unit, tails=tails, output_tail=output_state, kernels=kernels,
        )  # fmt: skip
    return (q, k, v, raw), tails


def check_states(sequence_slice, state, output_state) -> None:
    """Raises ValueError for a slice of sequences together with states of whole sequences."""
    if sequence_slice is not None and (state is not None or output_state):
        given = "a state" if state is not None else "output_state=True"
        raise ValueError(f"sequence_slice supplies the states of slices of sequences: {given} cannot be given as well")


def tails_before(plan: RoutingPlan, state: MemoryState | None) -> tuple[torch.Tensor | None, ...]:
    """The convolutions' inputs before every segment that an earlier call left; Nones without a convolution."""
    if state is None or state.q_tail.shape[2] == 0:
        return (None, None, None)
    return tuple(plan.to_segments(tail) for tail in (state.q_tail, state.k_tail, state.v_tail))


def run_rule(rows, tails, plan, parameters, state, output_state, sequence_slice, kernels):
    """The rule's gates, and the recurrence along every segment.

    Args:
        rows: q, k, v and the raw gates of every row, after the convolutions.
        tails: the convolutions' last inputs, for the new state.
    """
    (q, k, v, raw), rule, heads = rows, parameters.rule, parameters.num_heads
    key_heads = rule.num_key_heads(heads)
    widths = rule.projection_sizes(heads, q.shape[1] // key_heads, v.shape[1] // heads)[2:]
    raw = dict(zip(rule.gate_widths, raw[:, : sum(widths)].split(widths, dim=1), strict=True))
    q, k, v = (x.unflatten(1, (n, -1)) for x, n in ((q, key_heads), (k, key_heads), (v, heads)))
    inputs = rule.prepare(q, k, v, raw, parameters.rule_parameters, kernels)
    if sequence_slice is not None:
        return sequence_slice.recur(plan, rule, inputs, kernels), None
    initial_state = None if state is None else plan.to_segments(state.recurrent)
    inputs, cu_seqlens = _skip_spare_rows(inputs, plan, initial_state, kernels)
    o, recurrent = rule.recur(inputs, cu_seqlens, initial_state, output_state, kernels)
    if not output_state:
        return o, None
    return o, MemoryState(*(plan.from_segments(part) for part in (recurrent, *tails)))


def _skip_spare_rows(inputs: RuleInputs, plan: RoutingPlan, initial_state, kernels: str):
    """The recurrence's inputs and borders, such that Triton kernels compute no spare row but one chunk.

    A kernel that reads a whole chunk at the end of the last segment reads spare rows too. So the first spare rows are a
    segment of their own, which the kernels write as they write any other; the rows after that segment are skipped.
    """
    skips = plan.has_spare_rows and initial_state is None and resolve_kernels(kernels, inputs.q) == "triton"
    if not skips or checks.checks_values(plan.cu_seqlens):  # borders that are checked must end at R
        return inputs, plan.cu_seqlens
    end = (plan.cu_seqlens[-2:-1] + CHUNK).clamp(max=plan.num_rows)
    of_rows = {"q": inputs.q, "k": inputs.k, "v": inputs.v} | {  # a gate [H] is one for all rows
        name: gate for name, gate in inputs.gates.items() if gate.dim() > 1 and gate.shape[0] == plan.num_rows
    }
    q, k, v, *gates = zero_spare_gradients(tuple(of_rows.values()), plan, kernels=kernels)
    gates = {**inputs.gates, **dict(zip(list(of_rows)[3:], gates, strict=True))}
    return RuleInputs(q, k, v, gates), torch.cat([plan.cu_seqlens[:-1], end])


def _project(x, plan: RoutingPlan, projection, kernels: str) -> tuple[torch.Tensor, bool]:
    """Keys, values and raw gates of every row [R, O] and False; or of every token [N, O] and True."""
    if torch.is_tensor(projection):
        if projection.shape[0] == 1 and plan.num_all_memories > 1:
            return torch.nn.functional.linear(x, projection[0]), True
        return grouped_projection(x, projection, plan, kernels=kernels), False
    tokens = projection(x)
    if tokens.shape[0] == 1 and plan.num_all_memories > 1:
        return tokens[0], True
    # Masked rows lie in one more segment at the end; their outputs are dropped, so that any memory will do.
    memory_of_row = (plan.segment_of_row // plan.num_sequences).clamp(max=tokens.shape[0] - 1)
    return tokens.flatten(0, 1).index_select(0, memory_of_row * tokens.shape[1] + plan.token_of_row), False
