"""A rule from its equation alone: how the state changes with one token, in PyTorch, and nothing else.

The recurrence runs token by token, all segments at once, and differentiates through autograd. So a new rule trains,
decodes and is split over devices before its kernels are written; the kernels are then compared with this path.

Shape legend: rows R, segments S, heads H, key size K, value size V, tokens of the longest segment T.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.reference import bounds, unit_length
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs, dense_transition

COST = (
    "its recurrence runs token by token in PyTorch: tens of launches for every token of the longest sequence, one "
    "after another, and a state kept for every token until the backward pass"
)
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Mapping[str, torch.Tensor]], torch.Tensor]


def rule_from_equation(
    name: str,
    step: Step,
    *,
    gates: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    raw_gates: tuple[RawGate, ...] = (),
    parameter_shapes: Callable[[int], dict[str, tuple[int, ...]]] = lambda head_dim: {},
    init_parameters: Callable[[int, int], dict[str, torch.Tensor]] = lambda num_heads, head_dim: {},
    unit_length_keys: bool = True,
) -> MemoryRule:
    """A rule whose state changes by ``S <- step(S, k, v, gates)`` and is read by ``o = (q / sqrt(K))^T S``.

    Args:
        step: (state [N, H, K, V], k [N, H, K], v [N, H, V], {gate: [N, H, ...]}) -> the new state [N, H, K, V], for N
            sequences at once. Context parallelism composes the maps of slices, and therefore refuses a step that is not
            linear in the state and v together, and over more than two slices a step that does not multiply all columns
            of the state by one matrix; see :func:`check_step`.
        gates: (raw gates by name, [R, H], or [R, H, columns] where a raw gate has another number of columns than 1;
            parameters [H, ...] by name) -> gates [R, H, ...] by name, in float32 or more; the raw gates themselves
            where absent.
        raw_gates, parameter_shapes, init_parameters, unit_length_keys: as of :class:`MemoryRule`.
    """

    several = {gate.name for gate in raw_gates if gate.columns != 1}

    def computed_gates(raw, parameters, heads):
        raw = {key: value.unflatten(1, (heads, -1)) if key in several else value for key, value in raw.items()}
        return raw if gates is None else gates(raw, parameters)

    def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
        return RuleInputs(q, k, v, computed_gates(raw, parameters, v.shape[1]))

    def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
        return _all_segments(step, inputs, cu_seqlens, initial_state, output_final_state)

    def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
        if unit_length_keys:
            q, k = unit_length(q), unit_length(k)
        found = computed_gates(raw, parameters, v.shape[1])
        out, states = [], []
        for segment, (first, last) in enumerate(bounds(cu_seqlens)):
            zeros = q.new_zeros(*k.shape[1:], v.shape[2])
            state = (zeros if initial_state is None else initial_state[segment])[None]
            for t in range(first, last):
                state = step(state, k[t, None], v[t, None], {key: value[t, None] for key, value in found.items()})
                out.append(q.shape[2] ** -0.5 * torch.einsum("hk,hkv->hv", q[t], state[0]))
            states.append(state[0])
        return torch.stack(out) if out else torch.zeros_like(v), torch.stack(states)

    rule = MemoryRule(
        name=name,
        raw_gates=raw_gates,
        parameter_shapes=parameter_shapes,
        init_parameters=init_parameters,
        prepare=prepare,
        recur=recur,
        transition=dense_transition(recur),
        reference=reference,
        # A state is read and written: a product and a sum of K V numbers each, the delta rules' share added.
        recurrence_flops=lambda rows, heads, k_dim, v_dim: 8.0 * rows * heads * k_dim * v_dim,
        diagonal_transition=False,
        unit_length_keys=unit_length_keys,
        head_sizes=HEAD_SIZES,
        cost_without_kernels=COST,
    )
    return replace(rule, check_slices=partial(check_step, step, rule))


def check_step(step: Step, rule: MemoryRule, k_dim: int, v_dim: int, slices: int) -> None:
    """Raises ValueError where context parallelism over that many slices of a sequence cannot compose the steps.

    Computes a few steps on random numbers. A state before a slice is composed from T and B of the slices before,
    ``S_after = T S_before + B``, so that the step must be linear in S and v together. The slices between the first and
    the last also need T as a K x K matrix: one matrix for all columns of the state.
    """
    rows, heads = 3, 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q, k, v, other_v = (torch.randn(rows, heads, size).double() for size in (k_dim, k_dim, v_dim, v_dim))
        if rule.unit_length_keys:
            q, k = unit_length(q), unit_length(k)
        raw = {gate.name: torch.randn(rows, heads * gate.width(k_dim, v_dim)).double() for gate in rule.raw_gates}
        parameters = {name: value.double() for name, value in rule.init_parameters(heads, k_dim).items()}
        state, other = torch.randn(2, rows, heads, k_dim, v_dim).double()
        mixed = torch.randn(v_dim, v_dim).double() / v_dim**0.5
    gates = {name: gate.double() for name, gate in rule.prepare(q, k, v, raw, parameters, "torch").gates.items()}
    of_sum = step(0.7 * state - 1.3 * other, k, 0.7 * v - 1.3 * other_v, gates)
    if not _equal(of_sum, 0.7 * step(state, k, v, gates) - 1.3 * step(other, k, other_v, gates)):
        raise ValueError(
            f"the step of the update rule {rule.name} is not linear in the state and v together, so that context "
            f"parallelism cannot cut sequences into {slices} slices: leave out --context-parallel-size, or change the "
            "step"
        )
    nothing = torch.zeros_like(v)
    if slices > 2 and not _equal(step(state @ mixed, k, nothing, gates), step(state, k, nothing, gates) @ mixed):
        raise ValueError(
            f"the step of the update rule {rule.name} treats the columns of the state [K, V] differently, so that no "
            f"K x K matrix says what {slices} slices of a sequence do to the state: --context-parallel-size must be 1 "
            f"or 2, got {slices}"
        )


def _equal(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two results are equal but for rounding, also of a step that computes in float32."""
    return bool((x - y).norm() <= 1e-4 * y.norm())


def _all_segments(step: Step, inputs: RuleInputs, cu_seqlens, initial_state, output_final_state):
    """o [R, H, V] and the final states [S, H, K, V] or None; the host reads the segments' lengths.

    Rows after the last segment may hold anything in o: they are spare rows.
    """
    (rows, heads, k_dim), v_dim, dtype = inputs.k.shape, inputs.v.shape[2], compute_dtype(inputs.k.dtype)
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    longest = int(lengths.max()) if rows else 0
    # Row t of every segment, for all t: past a segment's end its last row, whose result is dropped.
    places = torch.arange(longest, device=cu_seqlens.device)[:, None]
    index = (starts + torch.minimum(places, (lengths - 1).clamp(min=0))).clamp(max=max(rows - 1, 0))  # [T, S]
    present = places < lengths  # [T, S]
    q, k, v = (x.to(dtype) for x in (inputs.q, inputs.k, inputs.v))
    gates = {name: x.to(dtype) for name, x in inputs.gates.items()}
    if initial_state is None:
        state = k.new_zeros(len(lengths), heads, k_dim, v_dim)
    else:
        state = initial_state.to(dtype)
    out = []
    for at, here in zip(index, present, strict=True):
        new = step(state, k[at], v[at], {name: x[at] for name, x in gates.items()})
        state = torch.where(here[:, None, None, None], new, state)
        out.append(k_dim**-0.5 * torch.einsum("shk,shkv->shv", q[at], state))
    if not out:
        return torch.zeros_like(inputs.v), state if output_final_state else None
    # Every row of a segment stands once in [T, S]. Rows after the last segment take some place in [T, S].
    row = torch.arange(rows, device=cu_seqlens.device)
    segment = (torch.searchsorted(cu_seqlens.long(), row, right=True) - 1).clamp(max=len(lengths) - 1)
    o = torch.stack(out)[(row - starts[segment]).clamp(max=longest - 1), segment]
    return o.to(inputs.v.dtype), state if output_final_state else None
