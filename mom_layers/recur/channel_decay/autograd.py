"""Gated linear attention and its gradients by the kernels of a kernel set.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.recur.channel_decay.kernel_sets import kernel_set
from mom_layers.recur.channel_decay.tensors import SPAN, Inputs
from mom_layers.recur.chunks import Chunks


class GatedLinearAttention(torch.autograd.Function):
    """Keeps its inputs, P of every chunk and one state a span; the backward pass computes q~ and k~ again."""

    @staticmethod
    def forward(ctx, q, k, v, g, cu_seqlens, initial_state, output_final_state, scale, for_backward):
        ctx.set_materialize_grads(False)
        q, k, v, g, cu_seqlens = (x.contiguous() for x in (q, k, v, g, cu_seqlens))
        kernels = kernel_set(q.device, q.dtype, q.shape[2], v.shape[2])
        inputs, chunks = Inputs(q, k, v, g, scale), Chunks.of(cu_seqlens, q.shape[0], SPAN)
        local = kernels.chunk_local(inputs=inputs, chunks=chunks)
        o, final_state, span_states = kernels.recurrence(
            inputs=inputs,
            local=local,
            chunks=chunks,
            initial_state=None if initial_state is None else initial_state.contiguous(),
            output_final_state=output_final_state,
            for_backward=for_backward,
        )
        if for_backward:
            ctx.save_for_backward(q, k, v, g, *chunks.tensors(), local.scores, span_states)
        ctx.kernels, ctx.scale = kernels, scale
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final_state):
        q, k, v, g, *chunk_tensors, scores, span_states = ctx.saved_tensors
        kernels, inputs, chunks = ctx.kernels, Inputs(q, k, v, g, ctx.scale), Chunks.from_tensors(chunk_tensors)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        local = kernels.chunk_local(inputs=inputs, chunks=chunks, scores=scores)
        dv, d_span_states, d_initial_state = kernels.reverse_recurrence(
            inputs=inputs,
            do=do,
            local=local,
            chunks=chunks,
            d_final_state=None if d_final_state is None else d_final_state.contiguous(),
            store_d_initial_state=ctx.needs_input_grad[5],
        )
        parts = kernels.state_gradients(
            inputs=inputs, do=do, local=local, chunks=chunks, span_states=span_states, d_span_states=d_span_states
        )
        whole_chunks = local.whole_chunks
        del local, span_states, d_span_states  # freed before the next tensors are allocated
        dq, dk, dg = kernels.local_gradients(
            inputs=inputs, do=do, chunks=chunks, parts=parts, whole_chunks=whole_chunks
        )
        return dq, dk, dv, dg, None, d_initial_state, None, None, None
