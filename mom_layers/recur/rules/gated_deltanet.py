"""Gated DeltaNet (arXiv 2412.06464): decay the state, then replace the value that it holds for the row's key.

``S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T`` with ``beta = sigmoid(x Wb)`` and
``g = -exp(A_log) softplus(x Wa + dt_bias)``: one beta and one g for each head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.common.reference import bounds, unit_length
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules.decay_rates import decay_rates
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs, dense_transition
from mom_layers.recur.scalar_delta import gated_delta_rule


def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    """One A_log and one dt_bias for each head."""
    return {"A_log": (), "dt_bias": ()}


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """As Gated DeltaNet: decay rates exp(A_log) uniform in (0, 16), time steps log-uniform in [1e-3, 1e-1]."""
    return decay_rates(num_heads, lowest=1e-6)


def gates(raw, parameters, kernels):
    """From raw gates beta and a [R, H], A_log and dt_bias [H]: g (log decay) and beta [R, H], in float32 or float64."""
    if resolve_kernels(kernels, raw["a"]) == "triton":
        from mom_layers.recur.scalar_delta.gates_triton import decay_gates_triton

        g, beta = decay_gates_triton(raw["beta"], raw["a"], parameters["A_log"], parameters["dt_bias"])
        return {"g": g, "beta": beta}
    dtype = compute_dtype(raw["a"].dtype)
    g = -parameters["A_log"].to(dtype).exp() * F.softplus(raw["a"].to(dtype) + parameters["dt_bias"].to(dtype))
    return {"g": g, "beta": torch.sigmoid(raw["beta"].to(dtype))}


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    return RuleInputs(q, k, v, gates(raw, parameters, kernels))


def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
    return gated_delta_rule(
        inputs.q, inputs.k, inputs.v, inputs.gates["g"], inputs.gates["beta"], cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, kernels=kernels,
    )  # fmt: skip


def initial_state_gradient(inputs: RuleInputs, do, cu_seqlens, initial_state, kernels):
    """In Triton one pass against time; elsewhere the gradient of :func:`recur`."""
    if resolve_kernels(kernels, do) == "triton":
        from mom_layers.recur.scalar_delta.operation import initial_state_gradient_triton

        return initial_state_gradient_triton(
            inputs.q, inputs.k, inputs.gates["g"], inputs.gates["beta"], do, cu_seqlens
        )
    return replace(RULE, initial_state_gradient=None).gradient_of_initial_state(inputs, do, cu_seqlens, None, kernels)


def gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, initial_state=None, scale=None):
    """The plain loop: ``S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = scale q^T S``.

    Args:
        q, k: [R, H, K]. v: [R, H, V]. g, beta: [R, H].
        cu_seqlens: [S + 1].
        initial_state: [S, H, K, V]; zeros when absent.
        scale: of q; K ** -0.5 when absent.

    Returns:
        o [R, H, V] and the final states [S, H, K, V].
    """
    heads, k_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    scale = k_dim**-0.5 if scale is None else scale
    out, states = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        state = q.new_zeros(heads, k_dim, v_dim) if initial_state is None else initial_state[segment]
        for t in range(first, last):
            state = state * g[t].exp()[:, None, None]
            delta = (v[t] - torch.einsum("hk,hkv->hv", k[t], state)) * beta[t][:, None]
            state = state + torch.einsum("hk,hv->hkv", k[t], delta)
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    o = torch.stack(out) if out else v.new_zeros(0, heads, v_dim)
    return o, torch.stack(states)


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gates, on q and k before they are brought to unit length."""
    g = -parameters["A_log"].exp() * F.softplus(raw["a"] + parameters["dt_bias"])
    beta = torch.sigmoid(raw["beta"])
    return gated_delta_rule_reference(unit_length(q), unit_length(k), v, g, beta, cu_seqlens, initial_state)


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
    raw_gates=(RawGate("beta", columns=1, hf="b"), RawGate("a", columns=1, hf="a")),
    parameter_shapes=parameter_shapes,
    init_parameters=init_parameters,
    prepare=prepare,
    recur=recur,
    transition=dense_transition(recur),
    reference=reference,
    recurrence_flops=recurrence_flops,
    diagonal_transition=False,
    unit_length_keys=True,
    head_sizes=HEAD_SIZES,
    initial_state_gradient=initial_state_gradient,
    decode_step=decode_step,
    family="scalar_delta",
)
