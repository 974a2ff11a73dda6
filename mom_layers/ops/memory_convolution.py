"""The three convolutions of a layer's rows as one step, so that the projection's gradient is written in one place.

Shape legend: tokens N, rows R, segments S, heads H, key size K, value size V, convolution width W.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.ops.backend import resolve_backend
from mom_layers.ops.routing_plan import RoutingPlan
from mom_layers.ops.segment_convolution import UNIT_LENGTH_EPS, segment_convolution


class _ConvolveProjected(torch.autograd.Function):
    """q by token, k and v as columns of the projection; the backward pass fills the projection's gradient in place."""

    @staticmethod
    def forward(ctx, q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, plan, unit_heads, output_tail):
        from mom_layers.ops.segment_convolution_triton import run_forward

        ctx.save_for_backward(q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail)
        ctx.plan, ctx.unit_heads = plan, unit_heads
        ctx.set_materialize_grads(False)
        keys, values = k_conv.shape[0], v_conv.shape[0]
        k, v, gates = projected.split((keys, values, projected.shape[1] - keys - values), dim=1)
        eps = UNIT_LENGTH_EPS
        q, q_tail = run_forward(q, q_conv, q_tail, plan, True, unit_heads, output_tail, eps)
        k, k_tail = run_forward(k, k_conv, k_tail, plan, False, unit_heads, output_tail, eps)
        v, v_tail = run_forward(v, v_conv, v_tail, plan, False, None, output_tail, eps)
        return q, k, v, gates.contiguous(), q_tail, k_tail, v_tail

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, dgates, dq_tail, dk_tail, dv_tail):
        from mom_layers.ops.rows_triton import sum_parts
        from mom_layers.ops.segment_convolution_triton import run_backward, weight_gradient_parts

        q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail = ctx.saved_tensors
        plan, unit_heads, needs = ctx.plan, ctx.unit_heads, ctx.needs_input_grad
        keys, values = k_conv.shape[0], v_conv.shape[0]
        sizes = (keys, values, projected.shape[1] - keys - values)
        dprojected = torch.empty_like(projected)
        k, v, _ = projected.split(sizes, dim=1)
        dk_in, dv_in, dgates_in = dprojected.split(sizes, dim=1)
        # The three weights' gradients as one, so that they are summed up in one launch.
        channels = (keys, keys, values)
        parts = weight_gradient_parts(q_conv, plan, sum(channels))
        q_parts, k_parts, v_parts = parts.split(channels, dim=2)
        eps = UNIT_LENGTH_EPS
        needs = [tail is not None and needs[i] for i, tail in ((5, q_tail), (6, k_tail), (7, v_tail))]
        dq, dq_tail = run_backward(q, q_conv, q_tail, plan, True, unit_heads, eps, dq, dq_tail, needs[0], q_parts)
        _, dk_tail = run_backward(
            k, k_conv, k_tail, plan, False, unit_heads, eps, dk, dk_tail, needs[1], k_parts, dk_in
        )
        _, dv_tail = run_backward(v, v_conv, v_tail, plan, False, None, eps, dv, dv_tail, needs[2], v_parts, dv_in)
        dq_conv, dk_conv, dv_conv = sum_parts(parts, q_conv.dtype, transpose=True).split(channels)
        dgates_in.zero_() if dgates is None else dgates_in.copy_(dgates)
        return dq, dprojected, dq_conv, dk_conv, dv_conv, dq_tail, dk_tail, dv_tail, None, None, None


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
    backend: str = "auto",
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
    if resolve_backend(backend, q) == "triton":
        from mom_layers.ops.segment_convolution_triton import check_arguments

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
    options = {"output_tail": output_tail, "backend": backend}
    unit = {"unit_length_heads": unit_length_heads}
    q, q_tail = segment_convolution(q, q_conv, plan, gather=True, initial_tail=tails[0], **unit, **options)
    k, k_tail = segment_convolution(k, k_conv, plan, initial_tail=tails[1], **unit, **options)
    v, v_tail = segment_convolution(v, v_conv, plan, initial_tail=tails[2], **options)
    return q, k, v, gates, (q_tail, k_tail, v_tail)
