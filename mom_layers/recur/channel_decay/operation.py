"""Gated linear attention over packed segments (GLA, arXiv 2312.06635): the public function and its checks.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.recur.channel_decay.torch import gated_linear_attention_torch
from mom_layers.recur.checks import check_for_triton, check_shapes, check_types


def _check(q, k, v, g, cu_seqlens, initial_state, kernels, scale=None):
    check_types(q, k, v, {"g": g}, cu_seqlens, initial_state, scale)
    check_shapes(q, k, v, cu_seqlens, initial_state)
    if g.shape != q.shape:
        raise ValueError(f"g must be {list(q.shape)} as q is, got {list(g.shape)}")
    if kernels == "triton":
        check_for_triton(q, k, v, {"g": g}, cu_seqlens, initial_state)


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs gated linear attention (GLA, arXiv 2312.06635) along every segment, 64 rows at a time.

    ``S <- diag(exp(g)) S + k v^T;  o = scale q^T S``

    Differentiable in q, k, v, g and initial_state, given gradients of o and of the final state. The Triton kernels are
    deterministic and never wait for the device, so that a CUDA graph can capture them, forward and backward. Their
    products run in the inputs' type with float32 sums; the state and the decays are float32.

    Args:
        q, k: [R, H, K].
        v: [R, H, V], of q's type. Triton kernels: float32, bfloat16 or float16; K and V in 16, 32, 64, 128, 256.
        g: [R, H, K] log of every key channel's decay, finite and at most 0. Triton kernels: any of those types
            (float32 is advised).
        cu_seqlens: [S + 1] int32 on q's device, from 0 to R, never decreasing; segments may be empty.
        initial_state: [S, H, K, V] float32; zeros when absent.
        output_final_state: also return the state after each segment.
        scale: of q; K ** -0.5 when absent.
        kernels: "torch" (PyTorch; reads lengths on the host), "triton", or "auto": "triton" for CUDA tensors.

    Returns:
        o [R, H, V] in v's type, and the final state [S, H, K, V] in float32 (float64 for float64 inputs) or None. An
        empty segment's final state is its initial state.

    Raises:
        ValueError: shapes that do not fit each other, an unknown name of kernels; with Triton kernels also types, head
            sizes or devices that they do not take.
    """
    kernels = resolve_kernels(kernels, q)
    _check(q, k, v, g, cu_seqlens, initial_state, kernels, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if kernels == "triton":
        from mom_layers.recur.channel_decay.autograd import GatedLinearAttention

        differentiable = (x for x in (q, k, v, g, initial_state) if x is not None)
        for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
        return GatedLinearAttention.apply(
            q, k, v, g, cu_seqlens, initial_state, output_final_state, scale, for_backward
        )
    o, state = gated_linear_attention_torch(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale)
    return o.to(v.dtype), state
