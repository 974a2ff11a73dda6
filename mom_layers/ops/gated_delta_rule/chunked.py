"""Gated delta rule over packed segments (Gated DeltaNet, arXiv 2412.06464), in chunks.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch

from mom_layers.ops.backend import compute_dtype, resolve_backend
from mom_layers.ops.chunk_rows import chunk_rows
from mom_layers.ops.chunk_table import CHUNK


def _gated_delta_rule_torch(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale):
    rows, heads, k_dim = q.shape
    v_dim = v.shape[2]
    dtype = compute_dtype(v.dtype)
    segments = cu_seqlens.shape[0] - 1
    state = q.new_zeros(segments, heads, k_dim, v_dim, dtype=dtype) if initial_state is None else initial_state
    if rows == 0:
        return torch.zeros_like(v), state if output_final_state else None
    place, running, order = chunk_rows(cu_seqlens, rows, CHUNK)

    def chunks(x):  # [R, H, *] -> [N, H, C, *], zeros where a chunk has no row
        padded = torch.cat([x.to(dtype), x.new_zeros(1, *x.shape[1:], dtype=dtype)])
        return padded.index_select(0, place.flatten()).unflatten(0, place.shape).transpose(1, 2)

    q, k, v, g, beta = (chunks(x) for x in (q * scale, k, v, g, beta))
    decay = g.cumsum(-1)  # [N, H, C]
    causal = torch.ones(place.shape[1], place.shape[1], dtype=torch.bool, device=q.device).tril()
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

    # From chunk to chunk: every segment's step at once; segments that have ended leave the front of the list.
    state = state.to(dtype)[torch.tensor(order, device=q.device)]
    outputs, finished = [], []
    steps = zip(*(x.split(running) for x in (u, w, q * from_start, scores, k_to_end, chunk_decay)), strict=True)
    for u_i, w_i, q_i, scores_i, k_i, decay_i in steps:
        active = u_i.shape[0]
        if active < state.shape[0]:
            finished.append(state[active:])
            state = state[:active]
        delta = u_i - w_i @ state
        outputs.append(q_i @ state + scores_i @ delta)
        state = decay_i * state + k_i @ delta
    o = torch.cat(outputs).transpose(1, 2).flatten(0, 1)  # [N * C, H, V]
    where = torch.empty(rows + 1, dtype=torch.long, device=o.device)
    where[place.flatten()] = torch.arange(place.numel(), device=o.device)
    o = o.index_select(0, where[:rows])
    if not output_final_state:
        return o, None
    back = torch.empty(segments, dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(segments)
    return o, torch.cat([state, *reversed(finished)])[back.to(o.device)]


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
    backend: str = "auto",
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
        backend: "auto", "torch" (chunked PyTorch; reads lengths on the host) or "triton".

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
    if resolve_backend(backend, q) == "triton":
        from mom_layers.ops.gated_delta_rule.autograd import gated_delta_rule_triton

        return gated_delta_rule_triton(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale)
    o, state = _gated_delta_rule_torch(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale)
    return o.to(v.dtype), state
