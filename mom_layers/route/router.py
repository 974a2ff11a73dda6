"""The router: which memories a token goes to, and with what weight."""

from __future__ import annotations

import torch

from mom_layers.common.kernels import compute_dtype, resolve_kernels


def route(logits: torch.Tensor, topk: int, *, kernels: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k of softmax, renormalised (MoM, eq. 5 and 6).

    Args:
        logits: [N, M]; the softmax is taken in float32 (float64 for float64 logits).
        topk: k.

    Returns:
        weights [N, k], which sum to 1, and memory ids [N, k].
    """
    if resolve_kernels(kernels, logits) == "triton" and logits.dtype != torch.float64:
        from mom_layers.route.router_triton import top_k_routing_triton

        return top_k_routing_triton(logits, topk)
    kept, ids = logits.to(compute_dtype(logits.dtype)).topk(topk, dim=-1)
    return torch.softmax(kept, dim=-1), ids


def load_balancing_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's balancing loss: ``M * sum_m (share of the choices) (mean probability)``; 1 when balanced.

    logits [N, M], ids [N, k]. Returns a scalar that is differentiable through the probabilities.
    """
    memories = logits.shape[-1]
    probabilities = torch.softmax(logits.to(compute_dtype(logits.dtype)), dim=-1)
    share = torch.zeros(memories, dtype=probabilities.dtype, device=logits.device)
    share.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=share.dtype))
    return memories * (share / ids.numel() * probabilities.mean(0)).sum()
