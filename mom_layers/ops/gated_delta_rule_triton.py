"""Gated delta rule over packed segments in Triton: argument checks, autograd, and the function that callers use.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk slots N.
"""

from __future__ import annotations

import torch

from mom_layers.ops.chunk_table import ChunkTable, chunk_table
from mom_layers.ops.gated_delta_rule_triton_backward import run_local_gradients, run_reverse_recurrence
from mom_layers.ops.gated_delta_rule_triton_forward import chunk_local, run_recurrence

SUPPORTED_SIZES = (16, 32, 64, 128, 256)
SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check(q, k, v, g, beta, cu_seqlens, initial_state):
    if q.dim() != 3 or k.shape != q.shape or v.dim() != 3 or v.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"q and k must be [R, H, K] and v [R, H, V], got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if g.shape != q.shape[:2] or beta.shape != q.shape[:2]:
        raise ValueError(f"g and beta must be {list(q.shape[:2])}, got {list(g.shape)} and {list(beta.shape)}")
    for name, size in (("K", q.shape[2]), ("V", v.shape[2])):
        if size not in SUPPORTED_SIZES:
            raise ValueError(f"head size {name} = {size} is not supported: choose one of {SUPPORTED_SIZES}")
    if q.dtype not in SUPPORTED_DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k and v must share one type of {SUPPORTED_DTYPES}, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if g.dtype not in SUPPORTED_DTYPES or beta.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"g and beta must be of a type in {SUPPORTED_DTYPES}, got {g.dtype} and {beta.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be [S + 1] int32, got {list(cu_seqlens.shape)} {cu_seqlens.dtype}")
    state_shape = (cu_seqlens.shape[0] - 1, q.shape[1], q.shape[2], v.shape[2])
    if initial_state is not None and (initial_state.shape != state_shape or initial_state.dtype != torch.float32):
        raise ValueError(
            f"initial_state must be {list(state_shape)} float32, got {list(initial_state.shape)} {initial_state.dtype}"
        )
    for name, tensor in (("k", k), ("v", v), ("g", g), ("beta", beta), ("cu_seqlens", cu_seqlens),
                         ("initial_state", initial_state)):  # fmt: skip
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on q's device {q.device}, got {name} on {tensor.device}")


class _GatedDeltaRule(torch.autograd.Function):
    """Keeps X, P and the decays of every chunk; the states and the errors e are computed again in the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale):
        ctx.set_materialize_grads(False)
        q, k, v, g, beta, cu_seqlens = (x.contiguous() for x in (q, k, v, g, beta, cu_seqlens))
        initial_state = None if initial_state is None else initial_state.contiguous()
        table = chunk_table(cu_seqlens, q.shape[0])
        o = torch.empty_like(v)
        final_state = None
        if output_final_state:
            final_state = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], v.shape[2], dtype=torch.float32)
        gates, solved, scores = chunk_local(q, k, g, beta, cu_seqlens, table)
        run_recurrence(k, v, beta, gates, solved, cu_seqlens, table, initial_state,
                       q=q, scores=scores, scale=scale, o=o, final_state=final_state)  # fmt: skip
        ctx.save_for_backward(q, k, v, g, beta, cu_seqlens, initial_state, *table, gates, solved, scores)
        ctx.scale = scale
        return o, final_state

    @staticmethod
    def backward(ctx, do, d_final_state):
        q, k, v, g, beta, cu_seqlens, initial_state, *table, gates, solved, scores = ctx.saved_tensors
        table = ChunkTable(*table)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        d_final_state = None if d_final_state is None else d_final_state.contiguous()
        states = q.new_empty(table.segment.shape[0], *q.shape[1:], v.shape[2])
        d_states, errors, d_errors = torch.empty_like(states), torch.empty_like(v), torch.empty_like(v)
        d_initial_state = torch.empty_like(initial_state) if ctx.needs_input_grad[6] else None
        run_recurrence(k, v, beta, gates, solved, cu_seqlens, table, initial_state, states=states, errors=errors)
        run_reverse_recurrence(q, k, beta, gates, solved, scores, do, cu_seqlens, table, ctx.scale, d_final_state,
                               d_initial_state, d_states, d_errors)  # fmt: skip
        dq, dk, dg, dbeta = run_local_gradients(q, k, g, beta, gates, scores, errors, d_errors, states, d_states, do,
                                                cu_seqlens, table, ctx.scale)  # fmt: skip
        dv = d_errors
        return dq, dk, dv, dg, dbeta, None, d_initial_state, None, None


def gated_delta_rule_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs the gated delta rule along every segment, 64 rows at a time, forward and backward.

    ``S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = scale q^T S``

    Differentiable in q, k, v, g, beta and initial_state, given gradients of o and of the final state. Deterministic;
    never waits for the device, so it can be captured in a CUDA graph. Products run in the inputs' type with float32
    sums; the state, the gates and the triangular solve are float32.

    Args:
        q, k: [R, H, K].
        v: [R, H, V], of q's type: float32, bfloat16 or float16. K and V in 16, 32, 64, 128, 256.
        g: [R, H] log of the decay, finite and at most 0; any of those types (float32 is advised).
        beta: [R, H], any of those types.
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
    _check(q, k, v, g, beta, cu_seqlens, initial_state)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    return _GatedDeltaRule.apply(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale)
