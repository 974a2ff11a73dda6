"""Linear attention with a scalar decay over packed segments: the public functions and their checks.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.recur.checks import check_for_triton, check_shapes, check_types
from mom_layers.recur.scalar_decay.torch import scalar_decay_torch

SIZES = tuple(range(16, 257, 16))
"""The key and value sizes that the Triton kernels take."""


def _check(q, k, v, g, cu_seqlens, initial_state, kernels, scale=None):
    gates = {} if g is None else {"g": g}
    check_types(q, k, v, gates, cu_seqlens, initial_state, scale)
    check_shapes(q, k, v, cu_seqlens, initial_state)
    if g is not None and g.shape not in (q.shape[:2], q.shape[1:2]):
        raise ValueError(
            f"g must be {list(q.shape[:2])}, or {list(q.shape[1:2])} for all rows, or None, got {list(g.shape)}"
        )
    if kernels == "triton":
        check_for_triton(q, k, v, gates, cu_seqlens, initial_state, sizes=SIZES)


def scalar_decay(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs linear attention with one decay a head along every segment, 64 rows at a time.

    ``S <- exp(g) S + k v^T;  o = scale q^T S``

    The recurrence of linear attention (arXiv 2006.16236, no decay), retention (2307.08621, a fixed decay) and Mamba2
    (2405.21060). Differentiable in q, k, v, g and initial_state, given gradients of o and of the final state. The
    Triton kernels are deterministic and never wait for the device, so that a CUDA graph can hold them. Their products
    run in the inputs' type with float32 sums; the state and the decays are float32.

    Args:
        q, k: [R, H, K].
        v: [R, H, V], of q's type. Triton kernels: float32, bfloat16 or float16; K and V multiples of 16 up to 256.
        g: [R, H] log of every row's decay, finite and at most 0; or [H], the same for all rows, or None, no decay:
            these two read no memory. Triton kernels: any of those types (float32 is advised).
        cu_seqlens: [S + 1] int32 on q's device, from 0 to R, never decreasing; segments may be empty.
        initial_state: [S, H, K, V] float32; zeros when absent.
        output_final_state: also return the state after each segment.
        scale: of q; K ** -0.5 when absent.
        kernels: "torch" (PyTorch; reads lengths on the host), "triton", or "auto": "triton" for CUDA tensors, "torch"
            for others.

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
        from mom_layers.recur.scalar_decay.autograd import ScalarDecay

        if g is not None and g.dim() == 1 and g.requires_grad:
            g = g.expand(q.shape[:2])  # the kernels sum up a gradient for every row
        return ScalarDecay.apply(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale)
    o, state = scalar_decay_torch(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale)
    return o.to(v.dtype), state


def initial_state_gradient_triton(
    q: torch.Tensor,
    g: torch.Tensor | None,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The gradient of :func:`scalar_decay`'s initial state through o alone, by Triton: one pass against time.

    Args:
        q, g, cu_seqlens, scale: as there.
        do: [R, H, V], the gradient of o.

    Returns:
        [S, H, K, V] float32; zeros for empty segments.

    Raises:
        ValueError: as there.
    """
    _check(q, q, do, g, cu_seqlens, None, "triton")
    from mom_layers.recur.scalar_decay.autograd import initial_state_gradient

    return initial_state_gradient(q, g, do, cu_seqlens, q.shape[2] ** -0.5 if scale is None else float(scale))
