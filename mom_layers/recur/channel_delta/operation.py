"""The delta rule with a decay a channel, over packed segments: the public functions and their checks.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.recur.channel_delta.torch import channel_delta_rule_torch
from mom_layers.recur.checks import check_for_triton, check_shapes, check_types


def _check(q, k, v, g, erase, write, cu_seqlens, initial_state, kernels, scale=None):
    gates = {"g": g, "erase": erase, "write": write}
    check_types(q, k, v, gates, cu_seqlens, initial_state, scale)
    check_shapes(q, k, v, cu_seqlens, initial_state)
    if g.shape != q.shape:
        raise ValueError(f"g must be {list(q.shape)} as q is, got {list(g.shape)}")
    for name, strength, rows in (("erase", erase, k), ("write", write, v)):
        if strength.shape not in (rows.shape, rows.shape[:2]):
            raise ValueError(
                f"{name} must be {list(rows.shape[:2])} or {list(rows.shape)}, got {list(strength.shape)}"
            )  # fmt: skip
    if kernels == "triton":
        check_for_triton(q, k, v, gates, cu_seqlens, initial_state)


def channel_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    erase: torch.Tensor,
    write: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decays every key channel of the state at its own rate, erases at a key, and writes there: along every segment,
    64 rows at a time, forward and backward.

    ``S <- diag(exp(g)) S;  S <- S + k (write v - S^T (erase k))^T;  o = scale q^T S``

    Differentiable in q, k, v, g, erase, write and initial_state, given gradients of o and of the final state. The
    Triton kernels are deterministic and never wait for the device, so that a CUDA graph can hold them. Their products
    run in the inputs' type with float32 sums; the state, the decays and the triangular solve are float32. Chunks
    where a channel decays by more than e^-60 in 32 rows take more time.

    Args:
        q, k: [R, H, K], unit length per head.
        v: [R, H, V], of q's type.
        g: [R, H, K] log of every key channel's decay, finite and at most 0.
        erase: [R, H], or [R, H, K] a channel, in [0, 1].
        write: [R, H], or [R, H, V] a channel.
        cu_seqlens: [S + 1] int32 on the same device, from 0 to R; segments may be empty.
        initial_state: [S, H, K, V] float32; zeros when absent.
        output_final_state: also return the state after each segment.
        scale: of q; K ** -0.5 when absent.
        kernels: "torch" (chunked PyTorch; reads lengths on the host), "triton", or "auto": "triton" for CUDA tensors,
            "torch" for others. Triton takes K and V of 16, 32, 64, 128 or 256; q, k and v of one type: float32,
            bfloat16 or float16; the gates of any of these types (float32 is advised for g).

    Returns:
        o [R, H, V] in v's type, and the final state [S, H, K, V] in float32 (float64 for float64 inputs) or None. An
        empty segment's final state is its initial state.

    Raises:
        ValueError: shapes, types, head sizes or devices that are not supported.
    """
    kernels = resolve_kernels(kernels, q)
    _check(q, k, v, g, erase, write, cu_seqlens, initial_state, kernels, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if kernels == "triton":
        from mom_layers.recur.channel_delta.autograd import ChannelDeltaRule

        differentiable = (x for x in (q, k, v, g, erase, write, initial_state) if x is not None)
        for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
        return ChannelDeltaRule.apply(
            q, k, v, g, erase, write, cu_seqlens, initial_state, output_final_state, scale, for_backward
        )
    o, state = channel_delta_rule_torch(
        q, k, v, g, erase, write, cu_seqlens, initial_state, output_final_state, scale
    )  # fmt: skip
    return o.to(v.dtype), state


def kimi_delta_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Kimi Delta Attention (KDA, arXiv 2510.26692): :func:`channel_delta_rule` with beta [R, H] for erase and write.

    ``S <- diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T;  o = scale q^T S``

    ``options``: the keyword arguments of :func:`channel_delta_rule`, whose results and errors these are.
    """
    return channel_delta_rule(q, k, v, g, beta, beta, cu_seqlens, **options)


def gated_delta_rule_2(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    b: torch.Tensor,
    w: torch.Tensor,
    cu_seqlens: torch.Tensor,
    **options,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated DeltaNet-2 (arXiv 2605.22791): :func:`channel_delta_rule`, erasing by b [R, H, K], writing by w [R, H, V].

    ``S <- diag(exp(g)) S;  S <- S + k (w v - S^T (b k))^T;  o = scale q^T S``

    ``options``: the keyword arguments of :func:`channel_delta_rule`, whose results and errors these are.
    """
    return channel_delta_rule(q, k, v, g, b, w, cu_seqlens, **options)


def initial_state_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    erase: torch.Tensor,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """The gradient of :func:`channel_delta_rule`'s initial state through o alone. Values have no part in that gradient.

    Args:
        q, k, g, erase, cu_seqlens, scale, kernels: as there. Triton takes one pass against time; PyTorch runs the
            operation forward and backward, with values of zero.
        do: [R, H, V], the gradient of o.

    Returns:
        [S, H, K, V] float32 (float64 for float64 inputs); zeros for empty segments.

    Raises:
        ValueError: as there.
    """
    kernels = resolve_kernels(kernels, q)
    no_write = torch.zeros_like(do[..., 0])
    _check(q, k, do, g, erase, no_write, cu_seqlens, None, kernels, scale)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    if kernels == "triton":
        from mom_layers.recur.channel_delta.autograd import initial_state_gradient as by_kernels

        return by_kernels(q, k, g, erase, do, cu_seqlens, scale)
    shape = (cu_seqlens.shape[0] - 1, *q.shape[1:], do.shape[2])
    with torch.enable_grad():
        state = torch.zeros(shape, dtype=compute_dtype(do.dtype), device=do.device, requires_grad=True)
        o, _ = channel_delta_rule_torch(
            q.detach(), k.detach(), torch.zeros_like(do), g.detach(), erase.detach(), no_write, cu_seqlens, state,
            False, scale,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(o, state, do.to(o.dtype), allow_unused=True, materialize_grads=True)
    return gradient
