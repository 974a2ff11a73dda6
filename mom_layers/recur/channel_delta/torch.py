"""The delta rule with a decay a channel over packed segments in PyTorch, chunk by chunk: any device, float64 too.

With E_i = erase_i k_i, sums of g over rows a < t <= b written as g(a, b], and start the row before the chunk's first:

    (1)  (I + A) [u | w] = [write v | E exp(g(start, i])]     A_ij = sum_K E_i k_j exp(g(j, i]), j < i
    (2)  e = u - w S
    (3)  o = q exp(g(start, i]) S + P e                       P_ij = sum_K q_i k_j exp(g(j, i]), j <= i
    (4)  S <- diag(exp(g(start, end])) S + (k exp(g(j, end]))^T e

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks_torch import ChunkRows, sums_after, sums_until


def _scores(later: list[torch.Tensor], k: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
    """``sum_K x_i k_j exp(g(j, i])`` for j < i and every x of ``later``; zero elsewhere.

    Blocks of 2, 4, ... C rows are put together from their halves: the later half meets the earlier one at the border
    between the halves. Both decay to the border, so that no exponent is positive and every sum of g is of its own rows.

    Args:
        later, k, g: [N, H, C, K], C a power of two.

    Returns:
        [N, H, C, C] for every x.
    """
    blocks = [x.new_zeros(*x.shape[:3], 1, 1) for x in later]  # [N, H, blocks, rows, rows]
    half = 1
    while half < k.shape[2]:
        g_early, g_late = g.unflatten(2, (-1, 2, half)).unbind(3)
        k_early = k.unflatten(2, (-1, 2, half)).select(3, 0) * sums_after(g_early).exp()
        decay = sums_until(g_late).exp()
        joined = []
        for x, block in zip(later, blocks, strict=True):
            across = (x.unflatten(2, (-1, 2, half)).select(3, 1) * decay) @ k_early.transpose(-1, -2)
            early, late = block.unflatten(2, (-1, 2)).unbind(3)
            joined.append(torch.cat([F.pad(early, (0, half)), torch.cat([across, late], -1)], -2))
        blocks, half = joined, 2 * half
    return [block.squeeze(2) for block in blocks]


def channel_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    erase: torch.Tensor,
    write: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`~mom_layers.recur.channel_delta.operation.channel_delta_rule` with ``kernels="torch"``, unchecked.

    o [R, H, V] comes back in the type of the sums: float32, or float64 for float64 inputs.
    """
    rows, heads, k_dim = q.shape
    dtype = compute_dtype(v.dtype)
    state = initial_state
    if state is None:
        state = q.new_zeros(cu_seqlens.shape[0] - 1, heads, k_dim, v.shape[2], dtype=dtype)
    if rows == 0:
        return torch.zeros_like(v), state if output_final_state else None
    chunks = ChunkRows(cu_seqlens, rows, CHUNK, power_of_two=True)
    erase, write = (x if x.dim() == 3 else x[..., None] for x in (erase, write))
    q, k, v, g, erase, write = (chunks.gather(x, dtype) for x in (q * scale, k, v, g, erase, write))
    erased = erase * k
    scores, key_scores = _scores([q, erased], k, g)
    scores = scores + torch.diag_embed((q * k).sum(-1))
    from_start = sums_until(g).exp()
    # (1). The solver reads neither the diagonal nor what is above it.
    right = torch.cat([write * v, erased * from_start], dim=-1)
    solved = torch.linalg.solve_triangular(key_scores, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[3], k_dim], dim=-1)
    k_to_end = (k * sums_after(g).exp()).transpose(-1, -2)
    decays = g.sum(-2).exp()[..., None]  # [N, H, K, 1]

    def step(state, u, w, q_from_start, scores, k_to_end, decay):
        error = u - w @ state  # (2)
        return q_from_start @ state + scores @ error, decay * state + k_to_end @ error  # (3), (4)

    o, state = chunks.walk(step, state.to(dtype), u, w, q * from_start, scores, k_to_end, decays)
    return o, state if output_final_state else None
