"""Gated linear attention over packed segments in Triton: argument checks, autograd, and the function that callers use.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk slots N.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.recur.channel_decay.triton.backward import run_reverse_recurrence, run_state_gradients
from mom_layers.recur.channel_decay.triton.forward import GROUP, chunk_scores, decayed_rows, run_recurrence
from mom_layers.recur.channel_decay.triton.local import run_local_gradients
from mom_layers.recur.chunk_table import CHUNK, ChunkTable, chunk_table

SUPPORTED_SIZES = (16, 32, 64, 128, 256)
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(q, k, v, g, cu_seqlens, initial_state):
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q and k must be [R, H, K] and v [R, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if g.shape != q.shape:
        raise ValueError(f"g must be {list(q.shape)} as q is, got {list(g.shape)}")
    for name, size in (("K", q.shape[2]), ("V", v.shape[2])):
        if size not in SUPPORTED_SIZES:
            raise ValueError(f"head size {name} = {size} is not supported: choose one of {SUPPORTED_SIZES}")
    if q.dtype not in SUPPORTED_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one type of {SUPPORTED_DTYPES}, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if g.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"g must be of a type in {SUPPORTED_DTYPES}, got {g.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [S + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    state_shape = (cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    if initial_state is not None and (initial_state.shape != state_shape or initial_state.dtype != torch.float32):
        raise ValueError(
            f"initial_state must be {list(state_shape)} float32, got {list(initial_state.shape)} {initial_state.dtype}"
        )
    for name, tensor in (("k", k), ("v", v), ("g", g), ("cu_seqlens", cu_seqlens), ("initial_state", initial_state)):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on q's device {q.device}, got {name} on {tensor.device}")


class _GatedLinearAttention(torch.autograd.Function):
    """Keeps its inputs, P of every chunk, and one state a group of chunks; the decayed q and k are computed again."""

    @staticmethod
    def forward(ctx, q, k, v, g, cu_seqlens, initial_state, output_final_state, scale, for_backward):
        ctx.set_materialize_grads(False)
        q, k, v, g, cu_seqlens = (x.contiguous() for x in (q, k, v, g, cu_seqlens))
        initial_state = None if initial_state is None else initial_state.contiguous()
        table = chunk_table(cu_seqlens, q.shape[0], kernels="triton")
        groups = chunk_table(cu_seqlens, q.shape[0], GROUP * CHUNK, kernels="triton")
        o = torch.empty_like(v)
        final_state = checkpoints = None
        if output_final_state:
            final_state = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], v.shape[2], dtype=torch.float32)
        if for_backward:
            checkpoints = q.new_empty(groups.segment.shape[0], *q.shape[1:], v.shape[2])
        q_decayed, k_decayed, chunk_decay = decayed_rows(q, k, g, cu_seqlens, table, scale)
        scores = chunk_scores(q, k, g, cu_seqlens, table, scale)
        run_recurrence(q_decayed, k_decayed, v, chunk_decay, scores, cu_seqlens, table, groups, initial_state,
                       o, final_state, checkpoints)  # fmt: skip
        if for_backward:
            ctx.save_for_backward(q, k, v, g, cu_seqlens, *table, *groups, scores, checkpoints)
        ctx.scale = scale
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final_state):
        q, k, v, g, cu_seqlens, *tables, scores, checkpoints = ctx.saved_tensors
        table, groups = ChunkTable(*tables[:3]), ChunkTable(*tables[3:])
        do = torch.zeros_like(v) if do is None else do.contiguous()
        d_final_state = None if d_final_state is None else d_final_state.contiguous()
        d_initial_state = None
        if ctx.needs_input_grad[5]:
            d_initial_state = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], v.shape[2], dtype=torch.float32)
        q_decayed, k_decayed, chunk_decay = decayed_rows(q, k, g, cu_seqlens, table, ctx.scale)
        dv, d_checkpoints = run_reverse_recurrence(
            q_decayed, k_decayed, chunk_decay, scores, do, cu_seqlens, table, groups,
            checkpoints, d_final_state, d_initial_state,
        )  # fmt: skip
        dq, dk, dg = run_state_gradients(
            q, k, v, g, q_decayed, k_decayed, chunk_decay, do, checkpoints, d_checkpoints,
            cu_seqlens, table, groups, ctx.scale,
        )  # fmt: skip
        del q_decayed, k_decayed, d_checkpoints
        run_local_gradients(q, k, v, g, do, dq, dk, dg, cu_seqlens, table, ctx.scale)
        return dq, dk, dv, dg.to(g.dtype), None, d_initial_state, None, None, None


def gated_linear_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs gated linear attention (GLA, arXiv 2312.06635) along every segment, 64 rows at a time, forward and backward.

    ``S <- diag(exp(g)) S + k v^T;  o = scale q^T S``

    Differentiable in q, k, v, g and initial_state, given gradients of o and of the final state. Deterministic; never
    waits for the device, so it can be captured in a CUDA graph. Products run in the inputs' type with float32 sums; the
    state and the gates are float32.

    Args:
        q, k: [R, H, K].
        v: [R, H, V], of q's type: float32, bfloat16 or float16. K and V in 16, 32, 64, 128, 256.
        g: [R, H, K] log of every key channel's decay, finite and at most 0; any of those types (float32 is advised).
        cu_seqlens: [S + 1] int32 on q's device, from 0 to R; segments may be empty.
        initial_state: [S, H, K, V] float32; zeros when absent.
        output_final_state: also return the state after each segment.
        scale: of q; K ** -0.5 when absent.

    Returns:
        o [R, H, V] in v's type, and the final state [S, H, K, V] float32 or None. An empty segment's final state is
        its initial state.

    Raises:
        ValueError: shapes, types, head sizes or devices that are not supported.
    """
    _check(q, k, v, g, cu_seqlens, initial_state)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    differentiable = (x for x in (q, k, v, g, initial_state) if x is not None)
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    return _GatedLinearAttention.apply(q, k, v, g, cu_seqlens, initial_state, output_final_state, scale, for_backward)
