"""Scalar decay and its gradients by the kernels of a kernel set.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from mom_layers.recur.scalar_decay.kernel_sets import kernel_set
from mom_layers.recur.scalar_decay.tensors import Cuts, DecayTerms, Inputs, PartStates


def _cuts(kernels, inputs: Inputs, cu_seqlens: torch.Tensor) -> Cuts:
    """Segments in parts, so many that the walk of o fills a chip."""
    q, (rows, heads, v_dim) = inputs.q, inputs.v.shape
    tile = kernels.launches_for(q.device, q.dtype, q.shape[2], v_dim).walk.tile
    return Cuts.of(cu_seqlens, rows, heads * -(-v_dim // tile), inputs.decay_by_row)


class ScalarDecay(torch.autograd.Function):
    """Keeps its inputs, and what parts add to the state where segments are cut; the backward pass computes the states
    again."""

    @staticmethod
    def forward(ctx, q, k, v, g, cu_seqlens, initial_state, output_final_state, scale):
        ctx.set_materialize_grads(False)
        q, k, v, cu_seqlens = (x.contiguous() for x in (q, k, v, cu_seqlens))
        g = None if g is None else g.contiguous()
        initial_state = None if initial_state is None else initial_state.contiguous()
        (_, heads, k_dim), v_dim = q.shape, v.shape[2]
        kernels, inputs = kernel_set(q.device, q.dtype, k_dim, v_dim), Inputs(q, k, v, g, scale)
        cuts = _cuts(kernels, inputs, cu_seqlens)
        decays = kernels.chunk_decays(inputs=inputs, cuts=cuts)
        common = {"decays": decays, "cuts": cuts, "scale": scale, "against_time": False}
        parts = kernels.part_states(b=k, c=v, **common) if cuts.in_parts else None
        final_state = None
        if output_final_state:  # an empty segment's final state is its initial state
            shape = cuts.num_segments, heads, k_dim, v_dim
            final_state = (
                torch.zeros(shape, dtype=torch.float32, device=q.device)
                if initial_state is None
                else initial_state.clone()
            )
        o = kernels.walk(a=q, b=k, c=v, **common, first_state=initial_state, part_states=parts, last_state=final_state)
        by_part = () if parts is None else (parts.states, parts.decays)
        ctx.save_for_backward(q, k, v, g, decays, initial_state, *by_part, *cuts.tensors())
        ctx.options = kernels, scale, cuts.part_chunks, cuts.in_parts
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, do, d_final_state):
        q, k, v, g, decays, initial_state, *rest = ctx.saved_tensors
        kernels, scale, part_chunks, in_parts = ctx.options
        parts = PartStates(*rest[:2]) if in_parts else None
        cuts = Cuts.from_tensors(rest[2 if in_parts else 0 :], part_chunks, in_parts)
        inputs = Inputs(q, k, v, g, scale)
        do = torch.zeros_like(v) if do is None else do.contiguous()
        d_final_state = None if d_final_state is None else d_final_state.contiguous()
        common = {"decays": decays, "cuts": cuts, "scale": scale}
        terms = None
        if inputs.decay_by_row and ctx.needs_input_grad[3]:
            launch = kernels.launches_for(q.device, q.dtype, v.shape[2], k.shape[2]).walk_with_terms
            tiles = -(-k.shape[2] // launch.tile)
            terms = DecayTerms.empty(inputs, cuts, tiles, launch.blocks, d_final_state is not None)

        # S is computed again for dq, dS twice: for dk and for dv.
        dq = kernels.walk(
            a=do, b=v, c=k, **common, against_time=False, transposed=True, first_state=initial_state,
            part_states=parts, reader=q, terms=terms,
        )  # fmt: skip
        del parts
        common |= {"against_time": True, "first_state": d_final_state}
        d_parts = None
        if in_parts:
            d_parts = kernels.part_states(b=q, c=do, decays=decays, cuts=cuts, scale=scale, against_time=True)
        common |= {"part_states": d_parts}
        dk = kernels.walk(a=v, b=do, c=q, **common, transposed=True, reader=k, terms=terms)
        d_initial_state = None
        if ctx.needs_input_grad[5]:  # the initial state of an empty segment is its final state
            d_initial_state = torch.zeros_like(initial_state) if d_final_state is None else d_final_state.clone()
        dv = kernels.walk(a=k, b=q, c=do, **common, last_state=d_initial_state)
        dg = None
        if terms is not None:
            dg = kernels.decay_gradient(
                inputs=inputs, do=do, decays=decays, cuts=cuts, terms=terms, from_zero=initial_state is None
            )
        return dq, dk, dv, dg, None, d_initial_state, None, None


@torch.no_grad()
def initial_state_gradient(
    q: torch.Tensor, g: torch.Tensor | None, do: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """The initial state's gradient [S, H, K, V] float32 through o alone: what the rows add to dS."""
    q, do, cu_seqlens = (x.contiguous() for x in (q, do, cu_seqlens))
    g = None if g is None else g.contiguous()
    (_, heads, k_dim), v_dim = q.shape, do.shape[2]
    kernels, inputs = kernel_set(q.device, q.dtype, k_dim, v_dim), Inputs(q, q, do, g, scale)
    cuts = _cuts(kernels, inputs, cu_seqlens)
    common = {"decays": kernels.chunk_decays(inputs=inputs, cuts=cuts), "cuts": cuts, "scale": scale}
    common |= {"b": q, "c": do, "against_time": True}
    d_parts = kernels.part_states(**common) if cuts.in_parts else None
    gradient = torch.zeros(cuts.num_segments, heads, k_dim, v_dim, dtype=torch.float32, device=q.device)
    kernels.walk(a=q, **common, part_states=d_parts, last_state=gradient)  # the outputs are not needed
    return gradient
