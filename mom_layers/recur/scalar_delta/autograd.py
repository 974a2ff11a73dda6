"""The gated delta rule and its gradients by the kernels of a kernel set.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.recur.chunks import Chunks
from mom_layers.recur.scalar_delta.kernel_sets import kernel_set
from mom_layers.recur.scalar_delta.tensors import ChunkLocal, ErrorRows, Inputs


class GatedDeltaRule(torch.autograd.Function):
    """Keeps X, P and the decays of every chunk, the errors e instead of v, and one state a span."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, cu_seqlens, initial_state, output_final_state, scale, for_backward):
        ctx.set_materialize_grads(False)
        q, k, v, g, beta, cu_seqlens = (x.contiguous() for x in (q, k, v, g, beta, cu_seqlens))
        kernels = kernel_set(q.device, q.dtype, q.shape[2], v.shape[2])
        inputs, chunks = Inputs(q, k, g, beta, scale), Chunks.of(cu_seqlens, q.shape[0])
        local = kernels.chunk_local(inputs=inputs, chunks=chunks)
        results = kernels.recurrence(
            inputs=inputs,
            v=v,
            local=local,
            chunks=chunks,
            initial_state=None if initial_state is None else initial_state.contiguous(),
            output_final_state=output_final_state,
            for_backward=for_backward,
        )
        if for_backward:
            ctx.save_for_backward(q, k, g, beta, *chunks.tensors(), local.decays, local.solve, local.scores,
                                  results.errors, results.span_states, results.decayed_state)  # fmt: skip
        ctx.kernels, ctx.scale, ctx.from_zero = kernels, scale, initial_state is None
        return results.o, results.final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final_state):
        q, k, g, beta, *chunk_tensors, decays, solve, scores, errors, span_states, decayed_state = ctx.saved_tensors
        # Unless the graph is kept, nothing else holds these tensors: each is freed at its `del`, before the next ones
        # are allocated. Most of the memory that a layer's backward pass takes is in here.
        ctx.maybe_clear_saved_tensors()
        kernels, inputs, chunks = ctx.kernels, Inputs(q, k, g, beta, ctx.scale), Chunks.from_tensors(chunk_tensors)
        do = torch.zeros_like(errors) if do is None else do.contiguous()
        d_errors, d_span_states, boundary, d_initial_state = kernels.reverse_recurrence(
            inputs=inputs,
            do=do,
            local=ChunkLocal(decays, solve, scores),
            chunks=chunks,
            span_states=span_states,
            decayed_state=decayed_state,
            d_final_state=None if d_final_state is None else d_final_state.contiguous(),
            store_d_initial_state=ctx.needs_input_grad[6],
        )
        del solve, decayed_state
        rows = ErrorRows(errors, d_errors, do)
        gradients = kernels.state_gradients(
            inputs=inputs, rows=rows, decays=decays, chunks=chunks, states=d_span_states, so_far=None
        )
        del d_span_states
        gradients = kernels.state_gradients(
            inputs=inputs, rows=rows, decays=decays, chunks=chunks, states=span_states, so_far=gradients
        )
        del span_states
        dg, dbeta = kernels.local_gradients(
            inputs=inputs,
            rows=rows,
            scores=scores,
            chunks=chunks,
            so_far=gradients,
            boundary=boundary,
            from_zero=ctx.from_zero,
        )
        dv = d_errors  # the kernel wrote dv over d_errors
        return gradients.dq, gradients.dk, dv, dg, dbeta, None, d_initial_state, None, None, None


@torch.no_grad()
def initial_state_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The initial state's gradient [S, H, K, V] float32 through o alone: the reverse recurrence without the rest."""
    q, k, g, beta, do, cu_seqlens = (x.contiguous() for x in (q, k, g, beta, do, cu_seqlens))
    kernels = kernel_set(q.device, q.dtype, q.shape[2], do.shape[2])
    inputs, chunks = Inputs(q, k, g, beta, scale), Chunks.of(cu_seqlens, q.shape[0])
    local = kernels.chunk_local(inputs=inputs, chunks=chunks)
    # The kernel reads the forward pass's states for g's gradient, which is not needed here: zeros are as good.
    span_states = q.new_zeros(chunks.num_span_slots, *q.shape[1:], do.shape[2])
    *_, d_initial_state = kernels.reverse_recurrence(
        inputs=inputs,
        do=do,
        local=local,
        chunks=chunks,
        span_states=span_states,
        decayed_state=None,
        d_final_state=None,
        store_d_initial_state=True,
    )
    return d_initial_state
