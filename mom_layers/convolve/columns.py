"""The convolutions of a layer of one memory, whose queries, keys, values, raw gates and output gate are columns of one
projection of every token; the backward pass fills the projection's gradient in place.

Shape legend: tokens N, rows R = N, segments S, heads H, key size K, value size V, filter width W, columns of the raw
gates P.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.convolve.operation import UNIT_LENGTH_EPS, check_convolution, segment_convolution
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.rows import gather_rows


def split_columns(projected: torch.Tensor, keys: int, values: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values, raw gates and output gate: views of [N, H K + H K + H V + P + H V]."""
    return projected.split((keys, keys, values, projected.shape[1] - 2 * (keys + values), values), dim=1)


def _convolutions(projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, gather, unit_length_heads):
    """The three convolutions, and the columns that are not convolved."""
    from mom_layers.convolve.triton import Convolution

    q, k, v, raw_gates, output_gate = split_columns(projected, k_conv.shape[0], v_conv.shape[0])
    convolutions = (
        Convolution(q, q_conv, q_tail, gather, unit_length_heads),
        Convolution(k, k_conv, k_tail, gather, unit_length_heads),
        Convolution(v, v_conv, v_tail, gather, None),
    )
    return convolutions, raw_gates, output_gate


class _ConvolveColumns(torch.autograd.Function):
    """All columns pass through this function, so that backward writes the projection's whole gradient."""

    @staticmethod
    def forward(ctx, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, plan, unit_heads, output_tail):
        from mom_layers.convolve.triton import convolve_forward

        inputs = (projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail)
        ctx.save_for_backward(*inputs)
        ctx.plan, ctx.unit_heads = plan, unit_heads
        # A gradient that does not exist stays None, so that the kernels skip the work for it.
        ctx.set_materialize_grads(False)
        gather = not plan.rows_are_tokens
        convolutions, raw_gates, output_gate = _convolutions(*inputs, gather, unit_heads)
        (q, k, v), tails, raw_gates = convolve_forward(
            convolutions, plan, output_tail, UNIT_LENGTH_EPS, copied=raw_gates, gather_copied=gather
        )
        # There are no columns to copy.
        if raw_gates is None:
            raw_gates = projected.new_empty(plan.num_rows, 0)
        return q, k, v, raw_gates, output_gate, *tails

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, d_raw_gates, d_output_gate, dq_tail, dk_tail, dv_tail):
        from mom_layers.convolve.triton import convolve_backward

        projected, _, k_conv, v_conv, *tails = ctx.saved_tensors
        gather = not ctx.plan.rows_are_tokens
        convolutions, *_ = _convolutions(*ctx.saved_tensors, gather, ctx.unit_heads)
        # The kernels write each gradient to its columns: no concatenation.
        dprojected = torch.empty_like(projected)
        *inputs, d_raw_gates_in, d_output_gate_in = split_columns(dprojected, k_conv.shape[0], v_conv.shape[0])
        if d_raw_gates is None:
            d_raw_gates_in.zero_()
        if d_output_gate is None:
            d_output_gate_in.zero_()
        else:
            d_output_gate_in.copy_(d_output_gate)
        needed = [tail is not None and needs for tail, needs in zip(tails, ctx.needs_input_grad[4:7], strict=True)]
        _, dweights, dtails = convolve_backward(
            convolutions, ctx.plan, UNIT_LENGTH_EPS, (dq, dk, dv), (dq_tail, dk_tail, dv_tail), needed, inputs,
            copied=d_raw_gates, copy=d_raw_gates_in, to_tokens=gather,
        )  # fmt: skip
        return dprojected, *dweights, *dtails, None, None, None


def convolve_columns(
    projected: torch.Tensor,
    q_conv: torch.Tensor,
    k_conv: torch.Tensor,
    v_conv: torch.Tensor,
    plan: RoutingPlan,
    *,
    unit_length_heads: int | None,
    tails: tuple[torch.Tensor | None, ...] = (None, None, None),
    output_tail: bool = False,
    kernels: str = "auto",
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Convolves queries, keys and values of every token along its sequence, in Triton in one launch.

    ``q, k, v = unit(SiLU(conv(q))), unit(SiLU(conv(k))), SiLU(conv(v))``, each convolution as of
    :func:`~mom_layers.convolve.operation.segment_convolution`

    Args:
        projected: [N, H K + H K + H V + P + H V]: queries, keys, values, raw gates, output gate of every token.
        q_conv, k_conv: [H K, W]. v_conv: [H V, W].
        plan: of :func:`mom_layers.route.sequences.plan_sequences`: every token has one row.
        unit_length_heads: H, to bring q and k to unit length per head; None to leave them.
        tails: the inputs before each segment, [S, W - 1, channels] for q, k and v; None for zeros.
        output_tail: also return the last W - 1 inputs of every segment.
        kernels: "auto", "torch" or "triton", which takes what ``segment_convolution`` takes.

    Returns:
        (q, k [R, H K], v [R, H V], raw gates [R, P]) of the rows; the output gate [N, H V] of the tokens, a view of
        ``projected``; and the three tails (None without ``output_tail``).

    Raises:
        ValueError: a shape, size, type or stride that does not fit.
    """
    kernels = resolve_kernels(kernels, projected)
    keys, values, gather = k_conv.shape[0], v_conv.shape[0], not plan.rows_are_tokens
    if projected.dim() != 2 or projected.shape[0] != plan.num_rows or projected.shape[1] < 2 * (keys + values):
        least = 2 * (keys + values)
        raise ValueError(f"projected must be [{plan.num_rows}, at least {least}], got {list(projected.shape)}")
    widths = [weight.shape[-1] for weight in (q_conv, k_conv, v_conv)]
    if len(set(widths)) > 1:
        raise ValueError(f"q_conv, k_conv and v_conv must be equally wide, got {widths}")
    q, k, v, raw_gates, output_gate = split_columns(projected, keys, values)
    if kernels == "triton":
        # Checked here, because one launch replaces the three calls.
        check_convolution(q, q_conv, plan, gather, unit_length_heads, tails[0], kernels)
        check_convolution(k, k_conv, plan, gather, unit_length_heads, tails[1], kernels)
        check_convolution(v, v_conv, plan, gather, None, tails[2], kernels)
        tails = tuple(None if tail is None else tail.contiguous() for tail in tails)
        weights = (weight.contiguous() for weight in (q_conv, k_conv, v_conv))
        q, k, v, raw_gates, output_gate, *tails = _ConvolveColumns.apply(
            projected, *weights, *tails, plan, unit_length_heads, output_tail
        )
        return (q, k, v, raw_gates), output_gate, tuple(tails)
    # segment_convolution checks its own arguments.
    options = {"gather": gather, "output_tail": output_tail, "kernels": kernels}
    unit = {"unit_length_heads": unit_length_heads}
    q, q_tail = segment_convolution(q, q_conv, plan, initial_tail=tails[0], **unit, **options)
    k, k_tail = segment_convolution(k, k_conv, plan, initial_tail=tails[1], **unit, **options)
    v, v_tail = segment_convolution(v, v_conv, plan, initial_tail=tails[2], **options)
    if gather:
        raw_gates = gather_rows(raw_gates, plan, kernels=kernels)
    return (q, k, v, raw_gates), output_gate, (q_tail, k_tail, v_tail)
