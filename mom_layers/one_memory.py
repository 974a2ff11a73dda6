"""A layer of one memory alone: no router, no choices, no rows beside the tokens.

    mix_alone       a whole layer, from tokens to tokens
    step_alone      a whole layer for one new token of every sequence
    mix_projected   the part between the two projections (Megatron's layer enters here)

Shape legend: sequences B, tokens N, heads H, key size K, value size V, hidden size D, columns of the raw gates P.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from mom_layers.combine.operation import combine
from mom_layers.convolve.columns import convolve_columns
from mom_layers.convolve.operation import UNIT_LENGTH_EPS
from mom_layers.mixing import MemoryParameters, SequenceSlice, check_states, run_rule, tails_before
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.sequences import plan_sequences
from mom_layers.state import MemoryState


def step_alone(
    x: torch.Tensor,
    in_proj: Callable[[torch.Tensor], torch.Tensor],
    out_proj: Callable[[torch.Tensor], torch.Tensor],
    parameters: MemoryParameters,
    state: MemoryState,
) -> torch.Tensor:
    """A whole layer of one memory for one new token of every sequence; changes ``state`` in place. No gradients.

    Args:
        x: [B, D].
        in_proj, out_proj, parameters: as for :func:`mix_alone`; :func:`has_step` must hold.
        state: the layer's state of the B sequences.

    Returns:
        out [B, D].
    """
    keys, *rows, values = parameters.settings.fused_sizes
    q, rows, output_gate = in_proj(x).split((keys, sum(rows), values), dim=1)
    return out_proj(
        parameters.rule.decode_step(rows, q, output_gate, None, parameters, state, 0, True, UNIT_LENGTH_EPS)
    )


def mix_alone(
    x: torch.Tensor,
    in_proj: Callable[[torch.Tensor], torch.Tensor],
    out_proj: Callable[[torch.Tensor], torch.Tensor],
    parameters: MemoryParameters,
    cu_seqlens: torch.Tensor,
    *,
    token_mask: torch.Tensor | None = None,
    state: MemoryState | None = None,
    output_state: bool = False,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """A whole layer of one memory.

    Args:
        x: [B, T, D].
        in_proj: [N, D] -> [N, H K + H K + H V + P + H V], queries, keys, values, raw gates, output gates.
        out_proj: [N, H V] -> [N, D].
        parameters, cu_seqlens, token_mask, state, output_state: as for :func:`mix_tokens`.

    Returns:
        out [B, T, D] and the new state or None.
    """
    if token_mask is not None:
        # Padding may hold anything, NaN too, which a product with zero would keep.
        x = x.masked_fill(~token_mask[..., None], 0)
    tokens, mask = x.flatten(0, 1), None if token_mask is None else token_mask.flatten()
    plan = plan_sequences(cu_seqlens, tokens.shape[0], token_mask=mask, kernels=kernels)
    y, new_state = mix_projected(
        in_proj(tokens), plan, parameters, state=state, output_state=output_state, kernels=kernels
    )
    out = out_proj(y).unflatten(0, x.shape[:2])
    if token_mask is not None:
        out = out.masked_fill(~token_mask[..., None], 0)
    return out, new_state


def mix_projected(
    projected: torch.Tensor,
    plan: RoutingPlan,
    parameters: MemoryParameters,
    *,
    state: MemoryState | None = None,
    output_state: bool = False,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, MemoryState | None]:
    """The part between the projections of a layer of one memory: every token goes to the memory, with weight 1.

    Args:
        projected: [N, H K + H K + H V + P + H V], the tokens' queries, keys, values, raw gates (P columns) and output
            gates before SiLU: one linear map of the tokens.
        plan: of :func:`mom_layers.route.sequences.plan_sequences`.
        parameters: weights of the heads that are here; ``projection`` is not read.
        state, output_state, sequence_slice, kernels: as for :func:`mix_memories`.

    Returns:
        y [N, H V] before the output projection, and the new state or None.

    Raises:
        ValueError: ``sequence_slice`` together with ``state`` or ``output_state``.
    """
    check_states(sequence_slice, state, output_state)
    rule, settings = parameters.rule, parameters.settings
    tails, width = tails_before(plan, state), parameters.q_conv.shape[1]
    if sequence_slice is not None and width > 1:
        keys, values = settings.key_width, settings.value_width
        (projected,), (tail,) = sequence_slice.tails(plan, (projected,), (not plan.rows_are_tokens,), width)
        tails = tail.tensor_split((keys, 2 * keys, 2 * keys + values), dim=-1)[:3]
    rows, output_gate, tails = convolve_columns(
        projected, parameters.q_conv, parameters.k_conv, parameters.v_conv, plan,
        unit_length_heads=rule.num_key_heads(parameters.num_heads) if rule.unit_length_keys else None,
        tails=tails, output_tail=output_state, kernels=kernels,
    )  # fmt: skip
    o, new_state = run_rule(rows, tails, plan, parameters, state, output_state, sequence_slice, kernels)
    y = combine(
        o, None, None if plan.rows_are_tokens else plan.row_of_choice, output_gate.unflatten(1, o.shape[1:]),
        parameters.norm_weight, eps=settings.norm_eps, kernels=kernels,
    )  # fmt: skip
    return y.flatten(1), new_state
