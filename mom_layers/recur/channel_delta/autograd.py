"""The delta rule with a decay a channel, and its gradients, by the kernels of a kernel set.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.recur.channel_delta.kernel_sets import kernel_set
from mom_layers.recur.channel_delta.tensors import ErrorRows, Inputs, Values
from mom_layers.recur.chunks import Chunks


class ChannelDeltaRule(torch.autograd.Function):
    """Keeps its inputs, X and P of every chunk, the errors e, and one state a span; the backward pass computes the
    decayed rows again."""

    @staticmethod
    def forward(ctx, q, k, v, g, erase, write, cu_seqlens, initial_state, output_final_state, scale, for_backward):
        ctx.set_materialize_grads(False)
        q, k, v, g, erase, write, cu_seqlens = (x.contiguous() for x in (q, k, v, g, erase, write, cu_seqlens))
        kernels = kernel_set(q.device, q.dtype, q.shape[2], v.shape[2])
        inputs, chunks = Inputs(q, k, g, erase, scale), Chunks.of(cu_seqlens, q.shape[0])
        local = kernels.chunk_local(inputs=inputs, chunks=chunks)
        results = kernels.recurrence(
            inputs=inputs,
            values=Values(v, write),
            local=local,
            chunks=chunks,
            initial_state=None if initial_state is None else initial_state.contiguous(),
            output_final_state=output_final_state,
            for_backward=for_backward,
        )
        if for_backward:
            ctx.save_for_backward(q, k, v, g, erase, write, *chunks.tensors(), local.solve, local.scores,
                                  results.errors, results.span_states)  # fmt: skip
        ctx.kernels, ctx.scale = kernels, scale
        return results.o, results.final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final_state):
        q, k, v, g, erase, write, *chunk_tensors, solve, scores, errors, span_states = ctx.saved_tensors
        # Unless the graph is kept, nothing else holds these tensors: each is freed at its `del`.
        ctx.maybe_clear_saved_tensors()
        kernels, inputs, chunks = ctx.kernels, Inputs(q, k, g, erase, ctx.scale), Chunks.from_tensors(chunk_tensors)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        local = kernels.chunk_local(inputs=inputs, chunks=chunks, known=(solve, scores))
        d_errors, d_states, d_initial_state = kernels.reverse_recurrence(
            inputs=inputs,
            do=do,
            local=local,
            chunks=chunks,
            d_final_state=None if d_final_state is None else d_final_state.contiguous(),
            store_d_initial_state=ctx.needs_input_grad[7],
            store_d_states=True,
        )
        rows = ErrorRows(errors, d_errors, do)
        states = kernels.chunk_states(local=local, errors=errors, chunks=chunks, span_states=span_states)
        decays, whole_chunks = local.decays, local.whole_chunks
        del local, solve, scores, span_states
        score_gradients = kernels.score_gradients(inputs=inputs, values=Values(v, write), rows=rows, chunks=chunks)
        dq, dk, dg, d_erase = kernels.row_gradients(
            inputs=inputs,
            rows=rows,
            decays=decays,
            whole_chunks=whole_chunks,
            chunks=chunks,
            states=states,
            d_states=d_states,
            score_gradients=score_gradients,
        )
        d_write = score_gradients.d_write.to(write.dtype)
        return dq, dk, score_gradients.dv, dg.to(g.dtype), d_erase, d_write, None, d_initial_state, None, None, None


@torch.no_grad()
def initial_state_gradient(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    erase: torch.Tensor,
    do: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The initial state's gradient [S, H, K, V] float32 through o alone: the reverse recurrence without the rest."""
    q, k, g, erase, do, cu_seqlens = (x.contiguous() for x in (q, k, g, erase, do, cu_seqlens))
    kernels = kernel_set(q.device, q.dtype, q.shape[2], do.shape[2])
    inputs, chunks = Inputs(q, k, g, erase, scale), Chunks.of(cu_seqlens, q.shape[0])
    *_, d_initial_state = kernels.reverse_recurrence(
        inputs=inputs,
        do=do,
        local=kernels.chunk_local(inputs=inputs, chunks=chunks),
        chunks=chunks,
        d_final_state=None,
        store_d_initial_state=True,
        store_d_states=False,
    )
    return d_initial_state
