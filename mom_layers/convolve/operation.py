"""Depthwise causal convolution that starts anew at every segment, then SiLU, then unit length per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernels import compute_dtype, resolve_kernels
from mom_layers.route.plan import RoutingPlan
from mom_layers.route.rows import gather_rows

UNIT_LENGTH_EPS = 1e-6


def _final_tail(rows, plan, width, initial_tail):
    """The last W - 1 inputs of every segment, reaching back into the initial tail where a segment is shorter."""
    start, end = plan.cu_seqlens[:-1, None].long(), plan.cu_seqlens[1:, None].long()
    index = end - (width - 1) + torch.arange(width - 1, device=rows.device)  # [S, W - 1]
    tail = F.pad(rows, (0, 0, 0, 1))[torch.where(index >= start, index, rows.shape[0])]
    if initial_tail is not None:
        age = (index - start + width - 1).clamp(0, width - 2)[..., None].expand(*index.shape, rows.shape[1])
        tail = torch.where((index >= start)[..., None], tail, initial_tail.to(rows.dtype).gather(1, age))
    return tail


def _convolution_torch(x, weight, plan, gather, unit_length_heads, initial_tail, output_tail):
    rows = gather_rows(x, plan, kernels="torch") if gather else x
    width = weight.shape[1]
    dtype = compute_dtype(rows.dtype)
    taps, inputs = weight.to(dtype), rows.to(dtype)
    position = plan.position_of_row.long()

    y = inputs * taps[:, -1]
    for back in range(1, width):
        earlier = F.pad(inputs, (0, 0, back, 0))[: rows.shape[0]]
        if initial_tail is None:
            before = torch.zeros((), dtype=dtype, device=rows.device)
        else:
            age = (position - back + width - 1).clamp(0, width - 2)
            before = initial_tail.to(dtype)[plan.segment_of_row.long(), age]
        y = y + torch.where((position >= back)[:, None], earlier, before) * taps[:, width - 1 - back]
    y = F.silu(y)
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
    initial_tail: torch.Tensor | None = None,
    output_tail: bool = False,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Convolves each segment's rows along time: ``y_t = SiLU(sum_j weight[:, W-1-j] * x_{t-j})``.

    Args:
        x: [R, C] rows, or [N, C] tokens with ``gather``. The last dimension is contiguous; x may be a column slice.
        weight: [C, W], one filter a channel; ``weight[:, W-1]`` multiplies the row itself.
        plan: the rows' segments.
        gather: x holds tokens; row r reads ``x[plan.token_of_row[r]]``.
        unit_length_heads: H, to divide each head's C // H channels by their length after SiLU.
        initial_tail: [S, W - 1, C], the inputs before each segment's first row (the last one is the most recent);
            zeros when absent.
        output_tail: also return the inputs that the next call needs as its initial tail.

    Returns:
        y [R, C] in x's type, and the tail [S, W - 1, C] or None.

    Raises:
        ValueError: shapes that do not fit together.
    """
    expected_rows = plan.row_of_choice.shape[0] if gather else plan.num_rows
    if x.dim() != 2 or x.shape[0] != expected_rows:
        raise ValueError(f"x must be [{expected_rows}, C], got {list(x.shape)}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[1] or weight.shape[1] < 2:
        raise ValueError(f"weight must be [{x.shape[1]}, W] with W >= 2, got {list(weight.shape)}")
    if unit_length_heads is not None and x.shape[1] % unit_length_heads:
        raise ValueError(f"{x.shape[1]} channels do not divide into {unit_length_heads} heads")
    tail_shape = (plan.num_segments, weight.shape[1] - 1, x.shape[1])
    if initial_tail is not None and initial_tail.shape != tail_shape:
        raise ValueError(f"initial_tail must be {list(tail_shape)}, got {list(initial_tail.shape)}")
    if resolve_kernels(kernels, x) == "triton":
        from mom_layers.convolve.triton import segment_convolution_triton as convolve
    else:
        convolve = _convolution_torch
    return convolve(x, weight, plan, gather, unit_length_heads, initial_tail, output_tail)
