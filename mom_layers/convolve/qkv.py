"""The convolutions of a layer's queries, keys and values as one step, whose backward pass fills the projection's
gradient in place.

Shape legend: tokens N, rows R, segments S, heads H, key size K, value size V, filter width W, columns of the raw
gates P.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.convolve.operation import UNIT_LENGTH_EPS, check_convolution, segment_convolution
from mom_layers.route.plan import RoutingPlan


def _split(projected, keys, values):
    """The columns of keys, values and raw gates."""
    return projected.split((keys, values, projected.shape[1] - keys - values), dim=1)


def _convolutions(q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, unit_length_heads):
    """The three convolutions, and the raw gates' columns."""
    from mom_layers.convolve.triton import Convolution

    k, v, raw_gates = _split(projected, k_conv.shape[0], v_conv.shape[0])
    convolutions = (
        Convolution(q, q_conv, q_tail, True, unit_length_heads),
        Convolution(k, k_conv, k_tail, False, unit_length_heads),
        Convolution(v, v_conv, v_tail, False, None),
    )
    return convolutions, raw_gates


class _ConvolveQKV(torch.autograd.Function):
    """Queries by token, keys and values as columns of the projection. The raw gates are copied by the same launches, so
    that backward writes the projection's whole gradient."""

    @staticmethod
    def forward(ctx, q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail, plan, unit_heads, output_tail):
        from mom_layers.convolve.triton import convolve_forward

        inputs = (q, projected, q_conv, k_conv, v_conv, q_tail, k_tail, v_tail)
        ctx.save_for_backward(*inputs)
        ctx.plan, ctx.unit_heads = plan, unit_heads
        # A gradient that does not exist stays None, so that the kernels skip the work for it.
        ctx.set_materialize_grads(False)
        convolutions, raw_gates = _convolutions(*inputs, unit_heads)
        (q, k, v), tails, raw_gates = convolve_forward(
            convolutions, plan, output_tail, UNIT_LENGTH_EPS, copied=raw_gates
        )
        # There are no columns to copy.
        if raw_gates is None:
            raw_gates = projected.new_empty(plan.num_rows, 0)
        return q, k, v, raw_gates, *tails

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv, d_raw_gates, dq_tail, dk_tail, dv_tail):
        from mom_layers.convolve.triton import convolve_backward

        _, projected, _, k_conv, v_conv, *tails = ctx.saved_tensors
        convolutions, _ = _convolutions(*ctx.saved_tensors, ctx.unit_heads)
        # The kernels write each gradient to its columns: no concatenation.
        dprojected = torch.empty_like(projected)
        dk_in, dv_in, d_raw_gates_in = _split(dprojected, k_conv.shape[0], v_conv.shape[0])
        if d_raw_gates is None:
            d_raw_gates_in.zero_()
        needed = [tail is not None and needs for tail, needs in zip(tails, ctx.needs_input_grad[5:8], strict=True)]
        (dq, *_), dweights, dtails = convolve_backward(
            convolutions, ctx.plan, UNIT_LENGTH_EPS, (dq, dk, dv), (dq_tail, dk_tail, dv_tail), needed,
            (None, dk_in, dv_in), copied=d_raw_gates, copy=d_raw_gates_in,
        )  # fmt: skip
        return dq, dprojected, *dweights, *dtails, None, None, None


def convolve_qkv(
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
    """Convolves queries, keys and values along their segments (MoM's short convolutions), in Triton in one launch.

    ``q_r, k_r, v_r = unit(SiLU(conv(q[token of r]))), unit(SiLU(conv(k_r))), SiLU(conv(v_r))``, each convolution as of
    :func:`~mom_layers.convolve.operation.segment_convolution`

    Args:
        q: [N, H K] queries of tokens; row r reads its token's.
        projected: [R, H K + H V + P], keys, values and raw gates, in this order.
        q_conv, k_conv: [H K, W]. v_conv: [H V, W].
        plan: the rows.
        unit_length_heads: H, to bring q and k to unit length per head; None to leave them.
        tails: the inputs before each segment, [S, W - 1, channels] for q, k and v; None for zeros.
        output_tail: also return the last W - 1 inputs of every segment.
        kernels: "auto", "torch" or "triton", which takes what ``segment_convolution`` takes.

    Returns:
        q, k [R, H K], v [R, H V], the raw gates [R, P], and the three tails (None without ``output_tail``).

    Raises:
        ValueError: a shape, size, type or stride that does not fit.
    """
    kernels = resolve_kernels(kernels, q)
    keys, values = k_conv.shape[0], v_conv.shape[0]
    if projected.dim() != 2 or projected.shape[0] != plan.num_rows or projected.shape[1] < keys + values:
        raise ValueError(f"projected must be [{plan.num_rows}, at least {keys + values}], got {list(projected.shape)}")
    widths = [weight.shape[-1] for weight in (q_conv, k_conv, v_conv)]
    if len(set(widths)) > 1:
        raise ValueError(f"q_conv, k_conv and v_conv must be equally wide, got {widths}")
    if kernels == "triton":
        # Checked here, because one launch replaces the three calls.
        k, v = projected[:, :keys], projected[:, keys : keys + values]
        check_convolution(q, q_conv, plan, True, unit_length_heads, tails[0], kernels)
        check_convolution(k, k_conv, plan, False, unit_length_heads, tails[1], kernels)
        check_convolution(v, v_conv, plan, False, None, tails[2], kernels)
        tails = tuple(None if tail is None else tail.contiguous() for tail in tails)
        weights = (weight.contiguous() for weight in (q_conv, k_conv, v_conv))
        q, k, v, raw_gates, *tails = _ConvolveQKV.apply(
            q, projected, *weights, *tails, plan, unit_length_heads, output_tail
        )
        return q, k, v, raw_gates, tuple(tails)
    # segment_convolution checks its own arguments.
    k, v, raw_gates = _split(projected, keys, values)
    options = {"output_tail": output_tail, "kernels": kernels}
    unit = {"unit_length_heads": unit_length_heads}
    q, q_tail = segment_convolution(q, q_conv, plan, gather=True, initial_tail=tails[0], **unit, **options)
    k, k_tail = segment_convolution(k, k_conv, plan, initial_tail=tails[1], **unit, **options)
    v, v_tail = segment_convolution(v, v_conv, plan, initial_tail=tails[2], **options)
    return q, k, v, raw_gates, (q_tail, k_tail, v_tail)
