"""Rows back to tokens: the weighted sum over a token's memories, RMSNorm for each head, and the output gate.

Shape legend: tokens N, rows R, heads H, value size V, routed memories that a token goes to k, choices of a token k + 1
(k without the shared memory).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mom_layers.common.checks import FLOATING, WHOLE, check_number, check_range, check_tensors
from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.common.supported import FLOAT_TYPES, HEAD_SIZES


def _check(o, weights, row_of_choice, output_gate, norm_weight, eps, kernels) -> None:
    check_tensors(FLOATING, o=o)
    check_tensors(FLOATING, o.device, output_gate=output_gate, norm_weight=norm_weight)
    check_number(eps=eps)
    if eps < 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if weights is None and row_of_choice is None:
        if o.dim() != 3:
            raise ValueError(f"o must be [N, H, V], got {list(o.shape)}")
        _check_sizes(o, o.shape[0], output_gate, norm_weight, kernels)
        return
    if weights is None:
        weights = o.new_empty(row_of_choice.shape[0], 0, dtype=torch.float32)
    check_tensors(FLOATING, o.device, weights=weights)
    check_tensors(WHOLE, o.device, row_of_choice=row_of_choice)
    if row_of_choice.dim() != 2 or row_of_choice.dtype != torch.int32:
        raise ValueError(
            f"row_of_choice must be int32 [N, k or k + 1], got {row_of_choice.dtype} {list(row_of_choice.shape)}"
        )
    tokens, choices = row_of_choice.shape
    if weights.dim() != 2 or weights.shape[0] != tokens or weights.shape[1] not in (choices, choices - 1):
        raise ValueError(f"weights must be [{tokens}, {choices - 1} or {choices}], got {list(weights.shape)}")
    if o.dim() != 3 or o.shape[0] != tokens * choices:
        raise ValueError(
            f"o must be [{tokens * choices}, H, V] for {tokens} tokens of {choices} choices, got {list(o.shape)}"
        )
    check_range(0, o.shape[0], row_of_choice=row_of_choice)
    if kernels == "triton" and weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32 for kernels='triton', got {weights.dtype}")
    _check_sizes(o, tokens, output_gate, norm_weight, kernels)


def _check_sizes(o, tokens, output_gate, norm_weight, kernels) -> None:
    _, heads, size = o.shape
    if output_gate.shape != (tokens, heads, size):
        raise ValueError(f"output_gate must be {[tokens, heads, size]}, got {list(output_gate.shape)}")
    if norm_weight.shape != (size,):
        raise ValueError(f"norm_weight must be [{size}], got {list(norm_weight.shape)}")
    if kernels == "torch":
        return
    for name, tensor in (("o", o), ("output_gate", output_gate), ("norm_weight", norm_weight)):
        if tensor.dtype not in FLOAT_TYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16 for kernels='triton', got {tensor.dtype}")
    if size not in HEAD_SIZES:
        raise ValueError(f"o must have a value size V in {HEAD_SIZES} for kernels='triton', got {size}")
    if output_gate.numel() and output_gate.stride(2) != 1:
        raise ValueError(
            "output_gate must have adjacent values for kernels='triton', "
            f"got {list(output_gate.shape)} with strides {output_gate.stride()}"
        )


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, weights, row_of_choice, output_gate, norm_weight, eps):
        # Imported on use, because Triton is not installed on every machine.
        from mom_layers.combine.triton import combine_forward

        ctx.save_for_backward(o, weights, row_of_choice, output_gate, norm_weight)
        ctx.eps = eps
        return combine_forward(o, weights, row_of_choice, output_gate, norm_weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        from mom_layers.combine.triton import combine_backward

        do, dweights, d_output_gate, dnorm_weight = combine_backward(*ctx.saved_tensors, dy, ctx.eps)
        return do, dweights, None, d_output_gate, dnorm_weight, None


def _combine_torch(o, weights, row_of_choice, output_gate, norm_weight, eps):
    dtype = compute_dtype(o.dtype)
    if row_of_choice is None:
        mixed = o.to(dtype)
    else:
        rows = o.index_select(0, row_of_choice.flatten()).unflatten(0, row_of_choice.shape).to(dtype)
        topk = 0 if weights is None else weights.shape[1]
        # The shared memory's row is the last choice and has no weight.
        mixed = rows[:, topk] if row_of_choice.shape[1] > topk else 0.0
        if topk:
            mixed = mixed + (rows[:, :topk] * weights.to(dtype)[:, :, None, None]).sum(1)
    # RMSNorm over the values of a head, then the output gate.
    mixed = mixed * torch.rsqrt((mixed * mixed).mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    return (mixed * F.silu(output_gate.to(dtype))).to(o.dtype)


def combine(
    o: torch.Tensor,
    weights: torch.Tensor | None,
    row_of_choice: torch.Tensor | None,
    output_gate: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    kernels: str = "auto",
) -> torch.Tensor:
    """Mixes the memories' outputs (MoM, eq. 9 and 10), normalises every head and applies the output gate.

    ``y_t = RMSNorm_V(sum_m w_t^m o_t^m + o_t^shared) * norm_weight * SiLU(output_gate_t)``

    Args:
        o: [R, H, V] outputs of the memories, one of every row.
        weights: [N, k] the router's weights; None without routed memories.
        row_of_choice: [N, k + 1] int32, every token's rows; the last is the shared memory's, whose weight is 1. [N, k]
            without the shared memory. Every row belongs to one choice. None where row n is token n's only row.
        output_gate: [N, H, V] before SiLU.
        norm_weight: [V].
        eps: added to the mean square.
        kernels: "auto", "torch" or "triton", which takes float32, bfloat16 and float16, V of 16, 32, 64, 128 or 256,
            float32 weights, and an output gate with adjacent values, which may be a view of a wider tensor.

    Returns:
        y [N, H, V] in o's type. All sums are in float32 (float64 for float64 outputs).

    Raises:
        ValueError: a shape, size, type or stride that does not fit.
    """
    kernels = resolve_kernels(kernels, o)
    _check(o, weights, row_of_choice, output_gate, norm_weight, eps, kernels)
    if kernels == "torch":
        return _combine_torch(o, weights, row_of_choice, output_gate, norm_weight, eps)
    weights, row_of_choice = (None if x is None else x.contiguous() for x in (weights, row_of_choice))
    return _Combine.apply(o.contiguous(), weights, row_of_choice, output_gate, norm_weight.contiguous(), eps)
