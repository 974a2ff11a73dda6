"""Gated delta rule over packed segments (Gated DeltaNet, arXiv 2412.06464), in chunks.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernels import compute_dtype, resolve_kernels
from mom_layers.recur.chunk_rows import ChunkRows
from mom_layers.recur.chunk_table import CHUNK


def _gated_delta_rule_torch(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale):
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
    decay = g.cumsum(-1)  # [N, H, C]
    causal = torch.ones(g.shape[2], g.shape[2], dtype=torch.bool, device=q.device).tril()
    between = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, -torch.inf).exp()

    # Inside a chunk: (I + strictly lower(beta k k^T decay)) [u | w] = [beta v | beta decay k]. The solver reads neither
    # the diagonal nor what is above it.
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
        delta = u - w @ state
        return q_from_start @ state + scores @ delta, decay * state + k_to_end @ delta

    o, state = chunks.walk(step, state.to(dtype), u, w, q * from_start, scores, k_to_end, chunk_decay)
    return o, state if output_final_state else None


def gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the gated delta rule along every segment.

    ``S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = scale q^T S``

    Args:
        q, k: [R, H, K], unit length per head.
        v: [R, H, V].
        g: [R, H] log of the decay, at most 0.
        beta: [R, H] in [0, 1].
        cu_seqlens: [S + 1] int32 on the same device, from 0 to R; segments may be empty.
        initial_state: [S, H, K, V] float32; zeros when absent.
        output_final_state: also return the state after each segment.
        scale: of q; K ** -0.5 when absent.
        kernels: "auto", "torch" (chunked PyTorch; reads lengths on the host) or "triton".

    Returns:
        o [R, H, V] in v's type, and the final state [S, H, K, V] in float32 (float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes, types or head sizes that are not supported.
    """
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q and k must be [R, H, K] and v [R, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if g.shape != q.shape[:2] or beta.shape != q.shape[:2]:
        raise ValueError(f"g and beta must be {list(q.shape[:2])}, got {list(g.shape)} and {list(beta.shape)}")
    state_shape = (cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {list(state_shape)}, got {list(initial_state.shape)}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if resolve_kernels(kernels, q) == "triton":
        from mom_layers.recur.scalar_delta.autograd import gated_delta_rule_triton

        return gated_delta_rule_triton(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale)
    o, state = _gated_delta_rule_torch(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale)
    return o.to(v.dtype), state
