"""Triton kernels of the router: top-k and a softmax over the chosen logits, one launch forward and one backward.

Shape legend: N tokens, M routed memories, k memories that a token goes to. Tiles are BN tokens by BM memories.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 1024  # of a [BN, BM] tile: 8 a thread with 4 warps; not tuned
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
    # The logits to choose from are finite, so that a row of NaN or -inf has k different choices too.
    b_left = tl.where(b_logits == b_logits, tl.maximum(b_logits, SMALLEST), SMALLEST)  # [BN, BM]
    b_left = tl.where((b_m < M)[None, :], b_left, float("-inf"))
    # Columns past k keep -inf, whose exponential is zero in the softmax.
    b_kept = tl.full([BN, BK], float("-inf"), tl.float32)
    b_ids = tl.zeros([BN, BK], tl.int32)
    # The k largest logits, one after another.
    for i in range(TOPK):
        b_id = tl.argmax(b_left, axis=1)  # [BN]
        # argmax takes the lower column of equal logits.
        m_chosen = b_m[None, :] == b_id[:, None]
        b_logit = tl.sum(tl.where(m_chosen, b_logits, 0.0), axis=1)  # [BN]
        b_left = tl.where(m_chosen, float("-inf"), b_left)
        b_kept = tl.where((b_k == i)[None, :], b_logit[:, None], b_kept)
        b_ids = tl.where((b_k == i)[None, :], b_id[:, None], b_ids)
    # w = softmax of the k kept logits.
    b_exp = tl.exp(b_kept - tl.max(b_kept, axis=1)[:, None])
    b_weights = b_exp / tl.sum(b_exp, axis=1)[:, None]
    # A NaN logit must show in the weights, although its memory was replaced by another.
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
    # The weights are all that the gradient needs; the logits are not kept.
    b_w = tl.load(weights + at, mask=m_nk, other=0.0)  # [BN, BK]
    b_dw = tl.load(dweights + at, mask=m_nk, other=0.0)
    b_ids = tl.load(ids + at, mask=m_nk, other=0).to(tl.int32)
    # The softmax's gradient: d_i = w_i (dw_i - sum_j w_j dw_j).
    b_d = b_w * (b_dw - tl.sum(b_w * b_dw, axis=1)[:, None])
    # d_i to the column of memory i; zero for memories that were not chosen.
    b_dlogits = tl.zeros([BN, BM], tl.float32)
    for i in range(TOPK):
        m_i = (b_k == i)[None, :]
        b_id = tl.sum(tl.where(m_i, b_ids, 0), axis=1)  # [BN]
        b_d_i = tl.sum(tl.where(m_i, b_d, 0.0), axis=1)  # [BN]
        b_dlogits = tl.where(b_m[None, :] == b_id[:, None], b_d_i[:, None], b_dlogits)
    p_d = dlogits + b_n[:, None] * M + b_m[None, :]
    tl.store(p_d, b_dlogits.to(dlogits.dtype.element_ty), mask=m_n[:, None] & (b_m < M)[None, :])


def _tile(tokens: int, memories: int, topk: int):
    """The grid and the sizes of both kernels."""
    # A token's logits lie in one tile, so that a program sees all of them.
    columns = triton.next_power_of_2(memories)
    block = max(1, TILE_ELEMENTS // columns)
    sizes = dict(M=memories, TOPK=topk, BN=block, BM=columns, BK=triton.next_power_of_2(topk))
    return (triton.cdiv(tokens, block),), dict(sizes, num_tokens=tokens, num_warps=4)


def top_k_forward(logits: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [N, M] with adjacent columns. Returns weights [N, k] float32 and memory ids [N, k] int64."""
    tokens, memories = logits.shape
    weights = torch.empty(tokens, topk, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, topk, dtype=torch.int64, device=logits.device)
    if tokens:
        grid, sizes = _tile(tokens, memories, topk)
        _forward_kernel[grid](
            logits=logits, weights=weights, ids=ids, stride_logits=logits.stride(0), **sizes
        )  # fmt: skip
    return weights, ids


def top_k_backward(
    weights: torch.Tensor, ids: torch.Tensor, dweights: torch.Tensor, shape: torch.Size, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient of the logits, of their shape [N, M] and type."""
    dlogits = torch.empty(shape, dtype=dtype, device=weights.device)
    if len(weights):
        grid, sizes = _tile(*shape, weights.shape[1])
        _backward_kernel[grid](
            weights=weights, ids=ids, dweights=dweights.contiguous(), dlogits=dlogits, **sizes
        )  # fmt: skip
    return dlogits
