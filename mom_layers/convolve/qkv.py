"""The three convolutions of a layer's rows as one step, so that the projection's gradient is written in one place.

Shape legend: tokens N, rows R, segments S, heads H, key size K, value size V, convolution width W.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.common.kernels import resolve_kernels
from mom_layers.convolve.operation import UNIT_LENGTH_EPS, segment_convolution
from mom_layers.route.plan import RoutingPlan


class _ConvolveProjected(torch.autograd.Function):
    """q by token, k and v as columns of the projection; the backward pass fills the projection's gradient in place."""

    @staticmethod
    def forward(ctx, q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, plan, unit_heads, output_tail):
        from mom_layers.convolve.triton import run_forward

        inputs = (q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail)
        ctx.save_for_backward(*inputs)
        ctx.plan, ctx.unit_heads = plan, unit_heads
        ctx.set_materialize_grads(False)
        convolutions, gates = _parts(*inputs, unit_heads)
        (q, k, v), tails, gates = run_forward(convolutions, plan, output_tail, UNIT_LENGTH_EPS, copied=gates)
        if gates is None:
            gates = projected.new_empty(plan.num_rows, 0)
        return q, k, v, gates, *tails

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, dgates, dq_tail, dk_tail, dv_tail):
        from mom_layers.convolve.triton import run_backward

        _, projected, _, k_conv, v_conv, *tails = ctx.saved_tensors
        convolutions, gates = _parts(*ctx.saved_tensors, ctx.unit_heads)
        dprojected = torch.empty_like(projected)
        sizes = (k_conv.shape[0], v_conv.shape[0], gates.shape[1])
        dk_in, dv_in, dgates_in = dprojected.split(sizes, dim=1)
        if dgates is None:
            dgates_in.zero_()
        needed = [tail is not None and needs for tail, needs in zip(tails, ctx.needs_input_grad[5:8], strict=True)]
        (dq, *_), dweights, dtails = run_backward(
            convolutions, ctx.plan, UNIT_LENGTH_EPS, (dq, dk, dv), (dq_tail, dk_tail, dv_tail), needed,
            (None, dk_in, dv_in), copied=dgates, copy=dgates_in,
        )  # fmt: skip
        return dq, dprojected, *dweights, *dtails, None, None, None


def _parts(q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, unit_heads):
    """The three convolutions, and the gates' columns."""
    from mom_layers.convolve.triton import Convolution

    keys, values = k_conv.shape[0], v_conv.shape[0]
    k, v, gates = projected.split((keys, values, projected.shape[1] - keys - values), dim=1)
    convolutions = (
        Convolution(q, q_conv, q_tail, True, unit_heads),
        Convolution(k, k_conv, k_tail, False, unit_heads),
        Convolution(v, v_conv, v_tail, False, None),
    )
    return convolutions, gates


def convolve_memories(
    q: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Convolves queries, keys and values along their segments (MoM's short convolutions).

    Args:
        q: [N, H K] tokens; row r reads its own token's.
        projected: [R, H K + H V + gates], keys, values and whatever the rule's gates are, in this order.
        q_conv, k_conv: [H K, W]. v_conv: [H V, W].
        plan: the rows.
        unit_length_heads: H, to bring q and k to unit length per head.
        tails: the inputs before each segment, [S, W - 1, channels] for q, k and v.
        output_tail: also return the inputs that the next call needs.

    Returns:
        q, k [R, H K], v [R, H V], the gates' columns, and the three tails (None unless asked for).

    Raises:
        ValueError: shapes that do not fit together.
    """
    keys, values = k_conv.shape[0], v_conv.shape[0]
    if projected.dim() != 2 or projected.shape[0] != plan.num_rows or projected.shape[1] < keys + values:
        raise ValueError(f"projected must be [{plan.num_rows}, at least {keys + values}], got {list(projected.shape)}")
    widths = [weight.shape[-1] for weight in (q_conv, k_conv, v_conv)]
    if len(set(widths)) > 1:
        raise ValueError(f"the convolutions must be equally wide, got {widths}")
    if resolve_kernels(kernels, q) == "triton":
        from mom_layers.convolve.triton import check_arguments

        k, v = projected[:, :keys], projected[:, keys : keys + values]
        check_arguments(q, q_conv, plan, True, unit_length_heads, tails[0])
        check_arguments(k, k_conv, plan, False, unit_length_heads, tails[1])
        check_arguments(v, v_conv, plan, False, None, tails[2])
        tails = tuple(None if tail is None else tail.contiguous() for tail in tails)
        weights = (weight.contiguous() for weight in (q_conv, k_conv, v_conv))
        q, k, v, gates, *tails = _ConvolveProjected.apply(
            q, projected, *weights, *tails, plan, unit_length_heads, output_tail
        )
        return q, k, v, gates, tuple(tails)
    k, v, gates = projected.split((keys, values, projected.shape[1] - keys - values), dim=1)
    options = {"output_tail": output_tail, "kernels": kernels}
    unit = {"unit_length_heads": unit_length_heads}
    q, q_tail = segment_convolution(q, q_conv, plan, gather=True, initial_tail=tails[0], **unit, **options)
    k, k_tail = segment_convolution(k, k_conv, plan, initial_tail=tails[1], **unit, **options)
    v, v_tail = segment_convolution(v, v_conv, plan, initial_tail=tails[2], **options)
    return q, k, v, gates, (q_tail, k_tail, v_tail)
