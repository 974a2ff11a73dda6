"""Gated delta rule over packed segments in Triton: argument checks, autograd, and the function that callers use.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk slots N.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.recur.chunk_table import CHUNK, GROUP, ChunkTable, chunk_table
from mom_layers.recur.scalar_delta.triton.backward import StateGradientSums, run_reverse_recurrence, run_state_gradients
from mom_layers.recur.scalar_delta.triton.forward import chunk_local, run_recurrence
from mom_layers.recur.scalar_delta.triton.local import run_local_gradients

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
    """Keeps X, P and the decays of every chunk, the errors e instead of v, and one state a group of chunks."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale, for_backward):
        ctx.set_materialize_grads(False)
        q, k, v, g, beta, cu_seqlens = (x.contiguous() for x in (q, k, v, g, beta, cu_seqlens))
        initial_state = None if initial_state is None else initial_state.contiguous()
        table = chunk_table(cu_seqlens, q.shape[0], kernels="triton")
        groups = chunk_table(cu_seqlens, q.shape[0], GROUP * CHUNK, kernels="triton")
        o = torch.empty_like(v)
        final_state = decayed_state = checkpoints = errors = None
        if output_final_state:
            final_state = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], v.shape[2], dtype=torch.float32)
        if for_backward:
            checkpoints = q.new_empty(groups.segment.shape[0], *q.shape[1:], v.shape[2])
            errors = torch.empty_like(v)
            decayed_state = None if final_state is None else torch.empty_like(final_state, dtype=q.dtype)
        gates, solved, scores = chunk_local(q, k, g, beta, cu_seqlens, table)
        run_recurrence(q, k, v, beta, gates, solved, scores, cu_seqlens, table, groups, scale, initial_state,
                       o, final_state, decayed_state, checkpoints, errors)  # fmt: skip
        if for_backward:
            ctx.save_for_backward(q, k, g, beta, cu_seqlens, *table, *groups, gates, solved, scores, errors,
                                  checkpoints, decayed_state)  # fmt: skip
        ctx.scale, ctx.from_zero = scale, initial_state is None
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final_state):
        q, k, g, beta, cu_seqlens, *tables, gates, solved, scores, errors, checkpoints, decayed_state = (
            ctx.saved_tensors
        )
        ctx.maybe_clear_saved_tensors()  # unless the graph is kept: a layer's backward pass holds most in here
        table, groups = ChunkTable(*tables[:3]), ChunkTable(*tables[3:])
        do = torch.zeros_like(errors) if do is None else do.contiguous()
        d_final_state = None if d_final_state is None else d_final_state.contiguous()
        d_initial_state = None
        if ctx.needs_input_grad[6]:
            d_initial_state = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], do.shape[2], dtype=torch.float32)
        d_errors, d_checkpoints, boundary = run_reverse_recurrence(
            q, k, beta, gates, solved, scores, do, cu_seqlens, table, groups, ctx.scale,
            checkpoints, decayed_state, d_final_state, d_initial_state,
        )  # fmt: skip
        del solved, decayed_state
        dk, sums = torch.empty_like(k), StateGradientSums.empty(k, do.shape[2], table)
        run_state_gradients(q, k, beta, gates, errors, d_errors, do, d_checkpoints, cu_seqlens, table, groups,
                            ctx.scale, None, dk, sums)  # fmt: skip
        del d_checkpoints
        dq = torch.empty_like(q)
        run_state_gradients(q, k, beta, gates, errors, d_errors, do, checkpoints, cu_seqlens, table, groups,
                            ctx.scale, dq, dk, sums)  # fmt: skip
        del checkpoints
        dg, dbeta = run_local_gradients(
            q, k, g, beta, scores, errors, d_errors, do, dq, dk, *sums, boundary,
            cu_seqlens, table, groups, ctx.scale, ctx.from_zero,
        )  # fmt: skip
        dv = d_errors
        return dq, dk, dv, dg, dbeta, None, d_initial_state, None, None, None


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
    differentiable = (x for x in (q, k, v, g, beta, initial_state) if x is not None)
    for_backward = torch.is_grad_enabled() and any(x.requires_grad for x in differentiable)
    return _GatedDeltaRule.apply(q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale, for_backward)


@torch.no_grad()
def initial_state_gradient_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """The gradient of :func:`gated_delta_rule_triton`'s initial state through o alone: one walk against time.

    Args:
        q, k, g, beta, cu_seqlens, scale: as there.
        do: [R, H, V], the gradient of o.

    Returns:
        [S, H, K, V] float32; zeros for empty segments.

    Raises:
        ValueError: as there.
    """
    _check(q, k, do, g, beta, cu_seqlens, None)
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    q, k, g, beta, do, cu_seqlens = (x.contiguous() for x in (q, k, g, beta, do, cu_seqlens))
    table = chunk_table(cu_seqlens, q.shape[0], kernels="triton")
    groups = chunk_table(cu_seqlens, q.shape[0], GROUP * CHUNK, kernels="triton")
    gates, solved, scores = chunk_local(q, k, g, beta, cu_seqlens, table)
    gradient = q.new_empty(cu_seqlens.shape[0] - 1, *q.shape[1:], do.shape[2], dtype=torch.float32)
    # The walk multiplies dS with the states of the forward pass too, for dg: nobody asks for that here.
    no_states = q.new_zeros(groups.segment.shape[0], *q.shape[1:], do.shape[2])
    run_reverse_recurrence(
        q, k, beta, gates, solved, scores, do, cu_seqlens, table, groups, scale, no_states, None, None, gradient
    )
    return gradient
