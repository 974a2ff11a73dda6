"""Gated DeltaNet (arXiv 2412.06464): decay the state, then replace what it holds for this key.

``S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T`` with ``beta = sigmoid(x Wb)`` and
``g = -exp(A_log) softplus(x Wa + dt_bias)``, one number a head each.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from mom_layers.common.kernels import compute_dtype, resolve_kernels
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules.registry import MemoryRule, differentiate_initial_state
from mom_layers.recur.scalar_delta import gated_delta_rule

# The range of time steps that Mamba2 and Gated DeltaNet start from.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
A_MAX = 16.0


def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    """One number a head each."""
    return {"A_log": (), "dt_bias": ()}


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """A_log of decay rates uniform in (0, 16), dt_bias of time steps log-uniform in [1e-3, 1e-1], as Gated DeltaNet."""
    rate = torch.empty(num_heads).uniform_(1e-6, A_MAX)
    step = torch.exp(torch.empty(num_heads).uniform_(math.log(DT_MIN), math.log(DT_MAX))).clamp(min=DT_FLOOR)
    inverse_softplus = step + torch.log(-torch.expm1(-step))
    return {"A_log": rate.log(), "dt_bias": inverse_softplus}


def gates(raw, parameters, kernels):
    """raw beta, a [R, H]; A_log, dt_bias [H]. Returns g (log decay), beta [R, H] in float32 or float64."""
    if resolve_kernels(kernels, raw["a"]) == "triton":
        from mom_layers.recur.scalar_delta.gates_triton import decay_gates_triton

        g, beta = decay_gates_triton(raw["beta"], raw["a"], parameters["A_log"], parameters["dt_bias"])
        return {"g": g, "beta": beta}
    dtype = compute_dtype(raw["a"].dtype)
    g = -parameters["A_log"].to(dtype).exp() * F.softplus(raw["a"].to(dtype) + parameters["dt_bias"].to(dtype))
    return {"g": g, "beta": torch.sigmoid(raw["beta"].to(dtype))}


def recur(q, k, v, cu_seqlens, gates, initial_state, output_final_state, kernels):
    return gated_delta_rule(
        q, k, v, gates["g"], gates["beta"], cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, kernels=kernels,
    )  # fmt: skip


def transition(k, cu_seqlens, gates, kernels):
    """The product of ``exp(g) (I - beta k k^T)`` over a segment: its final state from the identity, with no values."""
    segments, (_, heads, k_dim) = cu_seqlens.shape[0] - 1, k.shape
    identity = torch.eye(k_dim, dtype=compute_dtype(k.dtype), device=k.device).expand(segments, heads, k_dim, k_dim)
    return recur(k, k, torch.zeros_like(k), cu_seqlens, gates, identity, True, kernels)[1]


def initial_state_gradient(q, k, do, cu_seqlens, gates, kernels):
    if resolve_kernels(kernels, q) == "triton":
        from mom_layers.recur.scalar_delta.autograd import initial_state_gradient_triton

        return initial_state_gradient_triton(q, k, gates["g"], gates["beta"], do, cu_seqlens)
    return differentiate_initial_state(recur)(q, k, do, cu_seqlens, gates, kernels)


def decode_step(*arguments):
    from mom_layers.decode import operation

    return operation.decode_step(*arguments)


def recurrence_flops(rows: int, heads: int, k_dim: int, v_dim: int) -> float:
    """Forward operations of the chunked form, per row and head, full chunks: six products of C x K or C x V tiles.

    k k^T and q k^T (2 C K each), the triangular solve for u and w (C (K + V)), scores times delta (2 C V), and the
    three products with the state (w S, q S, k^T delta: 2 K V each).
    """
    per_row = 4 * CHUNK * k_dim + CHUNK * (k_dim + v_dim) + 2 * CHUNK * v_dim + 6 * k_dim * v_dim
    return float(rows) * heads * per_row


RULE = MemoryRule(
    name="gated_deltanet",
    gate_widths={"beta": 1, "a": 1},
    parameter_shapes=parameter_shapes,
    init_parameters=init_parameters,
    gates=gates,
    recur=recur,
    transition=transition,
    initial_state_gradient=initial_state_gradient,
    diagonal_transition=False,
    unit_length_keys=True,
    head_sizes=(16, 32, 64, 128, 256),
    recurrence_flops=recurrence_flops,
    decode_step=decode_step,
)
