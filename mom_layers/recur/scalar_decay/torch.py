"""Scalar decay over packed segments in chunked PyTorch: any device, float64 too. Reads lengths on the host.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks_torch import ChunkRows


def scalar_decay_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`~mom_layers.recur.scalar_decay.operation.scalar_decay` with ``kernels="torch"``, unchecked.

    o [R, H, V] comes back in the type of the sums: float32, or float64 for float64 inputs.
    """
    rows, heads, k_dim = q.shape
    dtype = compute_dtype(v.dtype)
    state = initial_state
    if state is None:
        state = q.new_zeros(cu_seqlens.shape[0] - 1, heads, k_dim, v.shape[2], dtype=dtype)
    if rows == 0:
        return torch.zeros_like(v), state if output_final_state else None
    g = q.new_zeros(heads, dtype=dtype) if g is None else g
    chunks = ChunkRows(cu_seqlens, rows, CHUNK)
    q, k, v, g = (chunks.gather(x, dtype) for x in (q * scale, k, v, g.expand(rows, heads)))
    # The sums of g over j < t <= i, added up row by row: a difference of two sums would lose a small sum after a large.
    size = g.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)
    terms = g[..., :, None].masked_fill(~later, 0)  # [N, H, t, j]
    between = terms.cumsum(-2).masked_fill(~later.logical_or(later.new_ones(size).diag()), -torch.inf).exp()
    scores = (q @ k.transpose(-1, -2)) * between
    q_from_start = q * g.cumsum(-1).exp()[..., None]
    to_end = F.pad(g[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)  # of the rows after each row, from the end
    k_to_end = (k * to_end.exp()[..., None]).transpose(-1, -2)
    decays = g.sum(-1).exp()[..., None, None]

    def step(state, inside, q_from_start, k_to_end, decay, v):
        return inside + q_from_start @ state, decay * state + k_to_end @ v

    o, state = chunks.walk(step, state.to(dtype), scores @ v, q_from_start, k_to_end, decays, v)
    return o, state if output_final_state else None
