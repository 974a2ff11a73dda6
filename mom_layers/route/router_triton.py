"""Triton kernels of the router's choice: top-k and a softmax over what was chosen, one launch forward, one backward.

Shape legend: N tokens, M memories, k choices. Tiles are BN tokens by BM memories.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

TILE_ELEMENTS = 1024  # of a [BN, BM] tile: 8 a thread with 4 warps; not tuned
MAX_MEMORIES = 1024
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST = tl.constexpr(-3.4028234e38)  # of float32's finite numbers


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    logits, weights, ids, num_tokens, stride_logits: tl.constexpr,
    M: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m_n = b_n < num_tokens
    b_m = tl.arange(0, BM)
    b_k = tl.arange(0, BK)
    m_nm = m_n[:, None] & (b_m < M)[None, :]
    b_logits = tl.load(logits + b_n[:, None] * stride_logits + b_m[None, :], mask=m_nm, other=0.0).to(tl.float32)
    # What is left to choose from is finite, so that a row of NaN or -inf has k different choices too.
    b_left = tl.where(b_logits == b_logits, tl.maximum(b_logits, SMALLEST), SMALLEST)  # [BN, BM]
    b_left = tl.where((b_m < M)[None, :], b_left, float("-inf"))
    b_kept = tl.full([BN, BK], float("-inf"), tl.float32)
    b_ids = tl.zeros([BN, BK], tl.int32)
    for i in range(TOPK):
        b_id = tl.argmax(b_left, axis=1)  # [BN]
        m_chosen = b_m[None, :] == b_id[:, None]
        b_logit = tl.sum(tl.where(m_chosen, b_logits, 0.0), axis=1)  # [BN]
        b_left = tl.where(m_chosen, float("-inf"), b_left)
        b_kept = tl.where((b_k == i)[None, :], b_logit[:, None], b_kept)
        b_ids = tl.where((b_k == i)[None, :], b_id[:, None], b_ids)
    b_exp = tl.exp(b_kept - tl.max(b_kept, axis=1)[:, None])
    b_weights = b_exp / tl.sum(b_exp, axis=1)[:, None]
    b_nan = tl.sum(tl.where(m_nm & (b_logits != b_logits), 1, 0), axis=1) > 0  # [BN]
    b_weights = tl.where(b_nan[:, None], float("nan"), b_weights)
    at = b_n[:, None] * TOPK + b_k[None, :]
    m_nk = m_n[:, None] & (b_k < TOPK)[None, :]
    tl.store(weights + at, b_weights, mask=m_nk)
    tl.store(ids + at, b_ids.to(tl.int64), mask=m_nk)


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    weights, ids, dweights, dlogits, num_tokens,
    M: tl.constexpr, TOPK: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    b_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m_n = b_n < num_tokens
    b_m = tl.arange(0, BM)
    b_k = tl.arange(0, BK)
    at = b_n[:, None] * TOPK + b_k[None, :]
    m_nk = m_n[:, None] & (b_k < TOPK)[None, :]
    b_w = tl.load(weights + at, mask=m_nk, other=0.0)  # [BN, BK]
    b_dw = tl.load(dweights + at, mask=m_nk, other=0.0)
    b_ids = tl.load(ids + at, mask=m_nk, other=0).to(tl.int32)
    b_d = b_w * (b_dw - tl.sum(b_w * b_dw, axis=1)[:, None])
    b_dlogits = tl.zeros([BN, BM], tl.float32)
    for i in range(TOPK):
        m_i = (b_k == i)[None, :]
        b_id = tl.sum(tl.where(m_i, b_ids, 0), axis=1)  # [BN]
        b_d_i = tl.sum(tl.where(m_i, b_d, 0.0), axis=1)  # [BN]
        b_dlogits = tl.where(b_m[None, :] == b_id[:, None], b_d_i[:, None], b_dlogits)
    p_d = dlogits + b_n[:, None] * M + b_m[None, :]
    tl.store(p_d, b_dlogits.to(dlogits.dtype.element_ty), mask=m_n[:, None] & (b_m < M)[None, :])


def _tile(tokens: int, memories: int, topk: int):
    """Grid and sizes that both kernels share."""
    columns = triton.next_power_of_2(memories)
    block = max(1, TILE_ELEMENTS // columns)
    sizes = dict(M=memories, TOPK=topk, BN=block, BM=columns, BK=triton.next_power_of_2(topk))
    return (triton.cdiv(tokens, block),), dict(sizes, num_tokens=tokens, num_warps=4)


class TopKRouting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, topk):
        tokens, memories = logits.shape
        weights = torch.empty(tokens, topk, dtype=torch.float32, device=logits.device)
        ids = torch.empty(tokens, topk, dtype=torch.int64, device=logits.device)
        if tokens:
            grid, sizes = _tile(tokens, memories, topk)
            _forward_kernel[grid](
                logits=logits, weights=weights, ids=ids, stride_logits=logits.stride(0), **sizes
            )  # fmt: skip
        ctx.save_for_backward(weights, ids)
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        ctx.mark_non_differentiable(ids)
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(ctx, dweights, _):
        weights, ids = ctx.saved_tensors
        dlogits = torch.empty(ctx.shape, dtype=ctx.dtype, device=weights.device)
        if len(weights):
            grid, sizes = _tile(*ctx.shape, weights.shape[1])
            _backward_kernel[grid](
                weights=weights, ids=ids, dweights=dweights.contiguous(), dlogits=dlogits, **sizes
            )  # fmt: skip
        return dlogits, None


def top_k_routing_triton(logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k of softmax, renormalised: the softmax of the k largest logits.

    Args:
        logits: [N, M] in float32, bfloat16 or float16, M up to 1024, with adjacent columns.
        topk: k.

    Returns:
        weights [N, k] float32 and memory ids [N, k] int64, the largest logit first, of equal ones the lower memory. A
        token with NaN among its logits has NaN weights, and k different memories all the same.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    if logits.dim() != 2 or logits.dtype not in FLOATS or (logits.numel() and logits.stride(1) != 1):
        raise ValueError(
            "logits must be float32, bfloat16 or float16 [tokens, memories] with adjacent columns, "
            f"got {logits.dtype} {list(logits.shape)} with strides {logits.stride()}"
        )
    if not 1 <= topk <= logits.shape[1] <= MAX_MEMORIES:
        raise ValueError(f"topk must be between 1 and M, M up to {MAX_MEMORIES}; got {topk} of {logits.shape[1]}")
    return TopKRouting.apply(logits, topk)
