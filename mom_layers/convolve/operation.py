"""Depthwise causal convolution that starts anew at every segment, then SiLU, then unit length of every head. SiLU and
unit length can be left out.

Shape legend: tokens N, rows R, segments S, channels C, heads H, filter width W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mom_layers.common.checks import FLOATING, check_instance, check_tensors, check_whole
from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.common.supported import FLOAT_TYPES, HEAD_SIZES
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.rows import gather_rows

UNIT_LENGTH_EPS = 1e-6  # added to the squared length of a head
MAX_WIDTH = 8  # of the Triton kernels' filters, which keep W - 1 rows in registers


def check_convolution(x, weight, plan, gather, unit_length_heads, initial_tail, kernels) -> None:
    """Raises ValueError for arguments that :func:`segment_convolution` does not take; kernels: "torch" or "triton"."""
    check_instance(RoutingPlan, plan=plan)
    check_tensors(FLOATING, x=x)
    check_tensors(FLOATING, x.device, weight=weight)
    if initial_tail is not None:
        check_tensors(FLOATING, x.device, initial_tail=initial_tail)
    if unit_length_heads is not None:
        check_whole(0, unit_length_heads=unit_length_heads)
    inputs = plan.row_of_choice.shape[0] if gather else plan.num_rows
    if x.dim() != 2 or x.shape[0] != inputs:
        kind = "tokens" if gather else "rows"
        raise ValueError(f"x must be [{inputs}, C] for the {inputs} {kind} of this plan, got {list(x.shape)}")
    channels, heads = x.shape[1], unit_length_heads
    if weight.dim() != 2 or weight.shape[0] != channels or weight.shape[1] < 1:
        raise ValueError(f"weight must be [{channels}, W] with W >= 1, got {list(weight.shape)}")
    if heads is not None and (heads < 1 or channels % heads):
        raise ValueError(f"unit_length_heads must be a divisor of the {channels} channels, got {heads}")
    width = weight.shape[1]
    # One tail for each segment, the masked tokens' too.
    tail_shape = (plan.num_segments, width - 1, channels)
    if initial_tail is not None and initial_tail.shape != tail_shape:
        raise ValueError(f"initial_tail must be {list(tail_shape)}, got {list(initial_tail.shape)}")
    if kernels == "torch":
        return
    if x.dtype not in FLOAT_TYPES or (x.numel() and x.stride(1) != 1):
        raise ValueError(
            "x must be float32, bfloat16 or float16 with adjacent channels for kernels='triton', "
            f"got {x.dtype} with strides {x.stride()}"
        )
    if weight.dtype not in FLOAT_TYPES or (initial_tail is not None and initial_tail.dtype not in FLOAT_TYPES):
        tail_dtype = None if initial_tail is None else initial_tail.dtype
        raise ValueError(
            "weight and initial_tail must be float32, bfloat16 or float16 for kernels='triton', "
            f"got {weight.dtype} and {tail_dtype}"
        )
    if width > MAX_WIDTH:
        raise ValueError(f"weight must be at most {MAX_WIDTH} wide for kernels='triton', got {width}")
    if heads is not None and channels // heads not in HEAD_SIZES:
        raise ValueError(
            f"a head of unit length must have {HEAD_SIZES} channels for kernels='triton', "
            f"got {channels} channels in {heads} heads"
        )


class _SegmentConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, initial_tail, plan, gather, unit_length_heads, silu, output_tail):
        from mom_layers.convolve.triton import Convolution, convolve_forward

        ctx.save_for_backward(x, weight, initial_tail)
        ctx.plan, ctx.options = plan, (gather, unit_length_heads, silu)
        # A gradient that does not exist stays None, so that the kernels skip the work for it.
        ctx.set_materialize_grads(False)
        convolution = Convolution(x, weight, initial_tail, gather, unit_length_heads, silu)
        (y,), (tail,), _ = convolve_forward((convolution,), plan, output_tail, UNIT_LENGTH_EPS)
        return y, tail

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dtail):
        from mom_layers.convolve.triton import Convolution, convolve_backward

        convolution = Convolution(*ctx.saved_tensors, *ctx.options)
        (dx,), (dweight,), (dinitial_tail,) = convolve_backward(
            (convolution,), ctx.plan, UNIT_LENGTH_EPS, (dy,), (dtail,), (ctx.needs_input_grad[2],), (None,)
        )
        return dx, dweight, dinitial_tail, None, None, None, None, None


def _final_tail(rows, plan, width, initial_tail):
    """The last W - 1 inputs of every segment; a shorter segment's begin with the latest of its initial tail."""
    start, end = plan.cu_seqlens[:-1, None].long(), plan.cu_seqlens[1:, None].long()
    # Row numbers of the last W - 1 inputs; those before the segment's start come from its initial tail.
    index = end - (width - 1) + torch.arange(width - 1, device=rows.device)  # [S, W - 1]
    tail = F.pad(rows, (0, 0, 0, 1))[torch.where(index >= start, index, rows.shape[0])]
    if initial_tail is not None:
        entry = (index - start + width - 1).clamp(0, width - 2)[..., None].expand(*index.shape, rows.shape[1])
        tail = torch.where((index >= start)[..., None], tail, initial_tail.to(rows.dtype).gather(1, entry))
    return tail


def _convolution_torch(x, weight, plan, gather, unit_length_heads, silu, initial_tail, output_tail):
    rows = gather_rows(x, plan, kernels="torch") if gather else x
    width = weight.shape[1]
    dtype = compute_dtype(rows.dtype)
    taps, inputs = weight.to(dtype), rows.to(dtype)
    position = plan.position_of_row.long()

    # u_t = sum_j weight[:, W - 1 - j] x_{t - j}, one j at a time over all rows
    y = inputs * taps[:, -1]
    for back in range(1, width):
        # The input `back` rows earlier, or an entry of the initial tail at the segment's first rows.
        earlier = F.pad(inputs, (0, 0, back, 0))[: rows.shape[0]]
        if initial_tail is None:
            before = torch.zeros((), dtype=dtype, device=rows.device)
        else:
            entry = (position - back + width - 1).clamp(0, width - 2)
            before = initial_tail.to(dtype)[plan.segment_of_row.long(), entry]
        y = y + torch.where((position >= back)[:, None], earlier, before) * taps[:, width - 1 - back]
    y = F.silu(y) if silu else y
    if unit_length_heads is not None:
        heads = y.unflatten(1, (unit_length_heads, -1))
        y = (heads * torch.rsqrt((heads * heads).sum(-1, keepdim=True) + UNIT_LENGTH_EPS)).flatten(1)
    return y.to(rows.dtype), _final_tail(rows, plan, width, initial_tail) if output_tail else None


def segment_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    plan: RoutingPlan,
    *,
    gather: bool = False,
    unit_length_heads: int | None = None,
    silu: bool = True,
    initial_tail: torch.Tensor | None = None,
    output_tail: bool = False,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolves each segment's rows along time (MoM's short convolution).

    ``y_t = unit(SiLU(sum_j weight[:, W - 1 - j] * x_{t - j}))`` over the rows t - j of the same segment, with
    ``unit(y) = y / sqrt(|y|^2 + 1e-6)`` for every head, or ``unit(y) = y`` without ``unit_length_heads``

    Args:
        x: [R, C] rows, or [N, C] tokens with ``gather``. May be a slice of a wider tensor's columns, which is not
            copied.
        weight: [C, W], one filter a channel; ``weight[:, W - 1]`` multiplies the row itself.
        plan: the rows' segments.
        gather: x holds tokens; row r reads ``x[plan.token_of_row[r]]``.
        unit_length_heads: H, to divide each head's C / H channels by their length after SiLU.
        silu: False for the sum over the taps itself in the place of its SiLU.
        initial_tail: [S, W - 1, C], the inputs before each segment's first row, the latest last; zeros when absent.
        output_tail: also return the last W - 1 inputs of every segment, which the next call takes as its initial tail.
        kernels: "auto", "torch" or "triton", which takes float32, bfloat16 and float16, adjacent channels in x, W up
            to 8, and heads of 16, 32, 64, 128 or 256 channels where ``unit_length_heads`` is given.

    Returns:
        y [R, C] and the tail [S, W - 1, C] (None without ``output_tail``), both in x's type. All sums are in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: a shape, size, type or stride that does not fit.
    """
    kernels = resolve_kernels(kernels, x)
    check_convolution(x, weight, plan, gather, unit_length_heads, initial_tail, kernels)
    if kernels == "torch":
        return _convolution_torch(x, weight, plan, gather, unit_length_heads, silu, initial_tail, output_tail)
    initial_tail = None if initial_tail is None else initial_tail.contiguous()
    return _SegmentConvolution.apply(
        x, weight.contiguous(), initial_tail, plan, gather, unit_length_heads, silu, output_tail
    )
