"""Gated linear attention over packed segments (GLA, arXiv 2312.06635), in chunks.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunks N.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernels import compute_dtype, resolve_kernels
from mom_layers.recur.chunk_rows import ChunkRows
from mom_layers.recur.chunk_table import CHUNK


def _until(g: torch.Tensor) -> torch.Tensor:
    """g [..., C, K] to its sum over the rows up to each one, itself included."""
    return g.cumsum(-2)


def _after(g: torch.Tensor) -> torch.Tensor:
    """g [..., C, K] to its sum over the rows after each one.

    Summed from the end, and not the total less the rest: a small sum beside a large total would be lost.
    """
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _inside_chunks(q, k, v, g):
    """What every row reads from its own chunk: q, k, g [N, H, C, K], v [N, H, C, V], C a power of two. [N, H, C, V].

    The later half of every block reads the earlier half, for blocks of C, C / 2, ... 2 rows. Both sides decay to the
    border between the halves, so that no exponent is positive, and every pair of rows meets in one block.
    """
    o = (q * k).sum(-1, keepdim=True) * v
    half = q.shape[2] // 2
    while half:
        q_late, k_early, v_early = (
            x.unflatten(2, (-1, 2, half)).select(3, part) for x, part in ((q, 1), (k, 0), (v, 0))
        )
        g_early, g_late = g.unflatten(2, (-1, 2, half)).unbind(3)
        scores = (q_late * _until(g_late).exp()) @ (k_early * _after(g_early).exp()).transpose(-1, -2)
        read = scores @ v_early  # [N, H, blocks, half, V]
        o = o + torch.stack([torch.zeros_like(read), read], 3).flatten(2, 4)
        half //= 2
    return o


def _gated_linear_attention_torch(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale):
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
    q_from_start = q * _until(g).exp()
    k_to_end = (k * _after(g).exp()).transpose(-1, -2)
    chunk_decay = g.sum(-2).exp()[..., None]  # [N, H, K, 1]

    def step(state, inside, q_from_start, k_to_end, decay, v):
        return inside + q_from_start @ state, decay * state + k_to_end @ v

    o, state = chunks.walk(step, state.to(dtype), inside, q_from_start, k_to_end, chunk_decay, v)
    return o, state if output_final_state else None


def gated_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    kernels: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs gated linear attention along every segment.

    ``S <- diag(exp(g)) S + k v^T;  o = scale q^T S``

    Args:
        q, k: [R, H, K].
        v: [R, H, V].
        g: [R, H, K] log of every key channel's decay, finite and at most 0.
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
    if g.shape != q.shape:
        raise ValueError(f"g must be {list(q.shape)} as q is, got {list(g.shape)}")
    state_shape = (cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    if initial_state is not None and initial_state.shape != state_shape:
        raise ValueError(f"initial_state must be {list(state_shape)}, got {list(initial_state.shape)}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if resolve_kernels(kernels, q) == "triton":
        from mom_layers.recur.channel_decay.autograd import gated_linear_attention_triton

        return gated_linear_attention_triton(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale)
    o, state = _gated_linear_attention_torch(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale)
    return o.to(v.dtype), state
