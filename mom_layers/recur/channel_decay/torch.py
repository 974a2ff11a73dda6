"""Gated linear attention over packed segments in PyTorch, chunk by chunk: any device, float64 too.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks_torch import ChunkRows, sums_after, sums_until


def _inside_chunks(q, k, v, g):
    """What every row reads from its own chunk: q, k, g [N, H, C, K], v [N, H, C, V], C a power of two. [N, H, C, V].

    The later half of every block reads the earlier half, for blocks of C, C / 2, ... 2 rows. Both halves decay to the
    border between them, so that no exponent is positive, and every pair of rows meets in exactly one block.
    """
    o = (q * k).sum(-1, keepdim=True) * v
    half = q.shape[2] // 2
    while half:
        q_late, k_early, v_early = (
            x.unflatten(2, (-1, 2, half)).select(3, part) for x, part in ((q, 1), (k, 0), (v, 0))
        )
        g_early, g_late = g.unflatten(2, (-1, 2, half)).unbind(3)
        scores = (q_late * sums_until(g_late).exp()) @ (k_early * sums_after(g_early).exp()).transpose(-1, -2)
        read = scores @ v_early  # [N, H, blocks, half, V]
        o = o + torch.stack([torch.zeros_like(read), read], 3).flatten(2, 4)
        half //= 2
    return o


def gated_linear_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`~mom_layers.recur.channel_decay.operation.gated_linear_attention` with ``kernels="torch"``, unchecked.

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
    q, k, v, g = (chunks.gather(x, dtype) for x in (q * scale, k, v, g))
    inside = _inside_chunks(q, k, v, g)
    q_from_start = q * sums_until(g).exp()
    k_to_end = (k * sums_after(g).exp()).transpose(-1, -2)
    decays = g.sum(-2).exp()[..., None]  # [N, H, K, 1]

    def step(state, inside, q_from_start, k_to_end, decay, v):
        return inside + q_from_start @ state, decay * state + k_to_end @ v

    o, state = chunks.walk(step, state.to(dtype), inside, q_from_start, k_to_end, decays, v)
    return o, state if output_final_state else None
