"""The router: which memories a token goes to, and with what weight.

Shape legend: tokens N, routed memories M, memories that a token goes to k.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.common.checks import FLOATING, check_tensors, check_whole
from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.common.supported import FLOAT_TYPES, MAX_MEMORIES


def _check(logits: torch.Tensor, topk: int, kernels: str) -> None:
    check_whole(0, topk=topk)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [N, M], got {list(logits.shape)}")
    if not 1 <= topk <= logits.shape[1]:
        raise ValueError(f"topk must be between 1 and the number of memories ({logits.shape[1]}), got {topk}")
    if kernels == "torch":
        return
    if logits.dtype not in FLOAT_TYPES or (logits.numel() and logits.stride(1) != 1):
        raise ValueError(
            "logits must be float32, bfloat16 or float16 [N, M] with adjacent columns for kernels='triton', "
            f"got {logits.dtype} {list(logits.shape)} with strides {logits.stride()}"
        )
    if logits.shape[1] > MAX_MEMORIES:
        raise ValueError(f"logits must have at most {MAX_MEMORIES} columns for kernels='triton', got {logits.shape[1]}")


class _TopKRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, topk):
        # Imported on use, because Triton is not installed on every machine.
        from mom_layers.route.router_triton import top_k_forward

        weights, ids = top_k_forward(logits, topk)
        ctx.save_for_backward(weights, ids)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _):
        from mom_layers.route.router_triton import top_k_backward

        return top_k_backward(*ctx.saved_tensors, dweights, ctx.shape, ctx.dtype), None


def route(logits: torch.Tensor, topk: int, *, kernels: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k of the softmax, renormalised (MoM, eq. 5 and 6): the softmax of the k largest logits.

    ``p_t = softmax(logits_t);  w_t = p_t / sum of the k largest``

    Args:
        logits: [N, M].
        topk: k, between 1 and M.
        kernels: "auto", "torch" or "triton". Triton takes float32, bfloat16 and float16 with adjacent columns, and M
            up to 1024; PyTorch computes float64 logits whatever ``kernels`` says.

    Returns:
        weights [N, k] in float32 (float64 for float64 logits), which sum to 1, and memory ids [N, k] int64, the largest
        logit first. In Triton the lower memory of equal logits comes first, and a token with NaN among its logits has
        NaN weights and k different memories all the same.

    Raises:
        ValueError: a shape, size, type or stride that is not supported.
    """
    check_tensors(FLOATING, logits=logits)
    kernels = resolve_kernels(kernels, logits)
    # The kernels compute in float32.
    if logits.dtype == torch.float64:
        kernels = "torch"
    _check(logits, topk, kernels)
    if kernels == "triton":
        return _TopKRouting.apply(logits, topk)
    # The softmax of the kept logits is the softmax of all, renormalised: the other terms cancel.
    kept, ids = logits.to(compute_dtype(logits.dtype)).topk(topk, dim=-1)
    return torch.softmax(kept, dim=-1), ids


def load_balancing_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Switch Transformer's balancing loss: ``M * sum_m (share of the choices) (mean probability)``; 1 when balanced.

    Args:
        logits: [N, M].
        ids: [N, k] the memories that :func:`route` chose.

    Returns:
        a scalar, differentiable through the probabilities.
    """
    memories = logits.shape[-1]
    probabilities = torch.softmax(logits.to(compute_dtype(logits.dtype)), dim=-1)
    share = torch.zeros(memories, dtype=probabilities.dtype, device=logits.device)
    share.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=share.dtype))
    return memories * (share / ids.numel() * probabilities.mean(0)).sum()
