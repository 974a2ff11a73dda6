"""Rows back to tokens: the weighted sum over a token's memories, RMSNorm per head, and the output gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernels import compute_dtype, resolve_kernels


def _combine_torch(o, weights, row_of_choice, gate, norm_weight, eps):
    dtype = compute_dtype(o.dtype)
    tokens, slots = row_of_choice.shape
    rows = o.index_select(0, row_of_choice.flatten()).unflatten(0, (tokens, slots)).to(dtype)
    topk = weights.shape[1]
    mixed = (rows[:, :topk] * weights.to(dtype)[:, :, None, None]).sum(1)
    if slots > topk:
        mixed = mixed + rows[:, topk]
    mixed = mixed * torch.rsqrt((mixed * mixed).mean(-1, keepdim=True) + eps) * norm_weight.to(dtype)
    return (mixed * F.silu(gate.to(dtype))).to(o.dtype)


def combine(
    o: torch.Tensor,
    weights: torch.Tensor,
    row_of_choice: torch.Tensor,
    gate: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    eps: float = 1e-6,
    kernels: str = "auto",
) -> torch.Tensor:
    """Mixes the memories' outputs (MoM, eq. 9 and 10), normalises each head and gates it.

    ``y_t = RMSNorm_V(sum_m w_t^m o_t^m + o_t^shared) * SiLU(gate_t)``

    Args:
        o: [R, H, V] what every row read from its memory.
        weights: [N, k] the router's weights.
        row_of_choice: [N, slots] int32; slots is k, or k + 1 where the last is the shared memory (weight 1).
        gate: [N, H, V] before SiLU.
        norm_weight: [V].

    Returns:
        [N, H, V] in o's type.

    Raises:
        ValueError: shapes that do not fit together.
    """
    tokens, slots = row_of_choice.shape
    if weights.shape[0] != tokens or weights.shape[1] not in (slots, slots - 1):
        raise ValueError(f"weights must be [{tokens}, {slots - 1} or {slots}], got {list(weights.shape)}")
    if o.dim() != 3 or o.shape[0] != tokens * slots:
        raise ValueError(f"o must be [{tokens * slots}, H, V], got {list(o.shape)}")
    if gate.shape != (tokens, *o.shape[1:]):
        raise ValueError(f"gate must be {[tokens, *o.shape[1:]]}, got {list(gate.shape)}")
    if norm_weight.shape != o.shape[2:]:
        raise ValueError(f"norm_weight must be [{o.shape[2]}], got {list(norm_weight.shape)}")
    if resolve_kernels(kernels, o) == "triton":
        from mom_layers.combine.triton import combine_triton as implementation
    else:
        implementation = _combine_torch
    return implementation(o, weights, row_of_choice, gate, norm_weight, eps)
