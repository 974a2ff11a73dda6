"""The gated delta rule over packed segments in chunked PyTorch: any device, float64 too. Reads lengths on the host.

With u and w solved inside every chunk, a chunk of the recurrence is

    (1)  (I + strictly_lower(beta k k^T exp(G_i - G_j))) [u | w] = [beta v | beta exp(G) k]
    (2)  delta = u - w S
    (3)  o = exp(G) q S + lower(q k^T exp(G_i - G_j)) delta
    (4)  S <- exp(G_last) S + (exp(G_last - G) k)^T delta

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks_torch import ChunkRows


def gated_delta_rule_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`~mom_layers.recur.scalar_delta.operation.gated_delta_rule`, which checks the inputs.

    Returns o in the type that sums are taken in, and the final state or None.
    """
    rows, heads, k_dim = q.shape
    v_dim = v.shape[2]
    dtype = compute_dtype(v.dtype)
    state = initial_state
    if state is None:
        state = q.new_zeros(cu_seqlens.shape[0] - 1, heads, k_dim, v_dim, dtype=dtype)
    if rows == 0:
        return torch.zeros_like(v), state if output_final_state else None
    chunks = ChunkRows(cu_seqlens, rows, CHUNK)
    q, k, v, g, beta = (chunks.gather(x, dtype) for x in (q * scale, k, v, g, beta))
    decay = g.cumsum(-1)  # G, [N, H, C]
    causal = torch.ones(g.shape[2], g.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()

    # (1). The solver reads neither the diagonal nor what is above it.
    k_beta = beta[..., None] * k
    from_start = decay.exp()[..., None]
    right = torch.cat([beta[..., None] * v, from_start * k_beta], dim=-1)
    solved = torch.linalg.solve_triangular(
        (k_beta @ k.transpose(-1, -2)) * between, right, upper=False, unitriangular=True
    )
    u, w = solved.split([v_dim, k_dim], dim=-1)
    scores = (q @ k.transpose(-1, -2)) * between
    k_to_end = (k * (decay[..., -1:] - decay).exp()[..., None]).transpose(-1, -2)
    chunk_decay = decay[..., -1].exp()[..., None, None]

    def step(state, u, w, q_from_start, scores, k_to_end, decay):
        delta = u - w @ state  # (2)
        return q_from_start @ state + scores @ delta, decay * state + k_to_end @ delta  # (3), (4)

    o, state = chunks.walk(step, state.to(dtype), u, w, q * from_start, scores, k_to_end, chunk_decay)
    return o, state if output_final_state else None
