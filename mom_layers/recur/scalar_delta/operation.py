"""Gated delta rule over packed segments (Gated DeltaNet, arXiv 2412.06464): the public functions and their checks.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.recur.checks import check_for_triton, check_shapes, check_types
from mom_layers.recur.scalar_delta.torch import gated_delta_rule_torch


def _check(q, k, v, g, beta, cu_seqlens, initial_state, kernels, scale=None):
    check_types(q, k, v, {"g": g, "beta": beta}, cu_seqlens, initial_state, scale)
    check_shapes(q, k, v, cu_seqlens, initial_state)
    if g.shape != q.shape[:2] or beta.shape != q.shape[:2]:
        raise ValueError(f"g and beta must be {list(q.shape[:2])}, got {list(g.shape)} and {list(beta.shape)}")
    if kernels == "triton":
        check_for_triton(q, k, v, {"g": g, "beta": beta}, cu_seqlens, initial_state)


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the gated delta rule along every segment, 64 rows at a time, forward and backward.

    ``S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = scale q^T S``

    Differentiable in q, k, v, g, beta and initial_state, given gradients of o and of the final state. The Triton
    kernels are deterministic and never wait for the device, so that a CUDA graph can hold them. Their products run in
    the inputs' type with float32 sums; the state, the decays and the triangular solve are float32.

    Args:
        q, k: [R, H, K], unit length per head.
        v: [R, H, V].
        g: [R, H] log of the decay, finite and at most 0.
        beta: [R, H] write strength, in [0, 1].
        cu_seqlens: [S + 1] int32 on the same device, from 0 to R; segments may be empty.
        initial_state: [S, H, K, V] float32; zeros when absent.
        output_final_state: also return the state after each segment.
        scale: of q; K ** -0.5 when absent.
        kernels: "auto", "torch" (chunked PyTorch; reads lengths on the host) or "triton". Triton takes K and V of 16,
            32, 64, 128 or 256; q, k and v of one type: float32, bfloat16 or float16; g and beta of any of these types
            (float32 is advised).

    Returns:
        o [R, H, V] in v's type, and the final state [S, H, K, V] in float32 (float64 for float64 inputs) or None. An
        empty segment's final state is its initial state.

    Raises:
        ValueError: shapes, types, head sizes or devices that are not supported.
    """
    kernels = resolve_kernels(kernels, q)
    _check(q, k, v, g, beta, cu_seqlens, initial_state, kernels, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if kernels == "triton":
        from mom_layers.recur.scalar_delta.autograd import GatedDeltaRule

        differentiable = (x for x in (q, k, v, g, beta, initial_state) if x is not None)
        for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
        return GatedDeltaRule.apply(
            q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale, for_backward
        )
    o, state = gated_delta_rule_torch(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale)
    return o.to(v.dtype), state


def initial_state_gradient_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The gradient of :func:`gated_delta_rule`'s initial state through o alone, by Triton: one pass against time.

    Args:
        q, k, g, beta, cu_seqlens, scale: as there.
        do: [R, H, V], the gradient of o.

    Returns:
        [S, H, K, V] float32; zeros for empty segments.

    Raises:
        ValueError: as there.
    """
    _check(q, k, do, g, beta, cu_seqlens, None, "triton")
    from mom_layers.recur.scalar_delta.autograd import initial_state_gradient

    return initial_state_gradient(q, k, g, beta, do, cu_seqlens, q.shape[2] ** -0.5 if scale is None else float(scale))
