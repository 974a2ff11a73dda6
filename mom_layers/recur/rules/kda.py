"""Kimi Delta Attention (KDA, arXiv 2510.26692): every key channel of the state decays at its own rate, then the value
that the state holds for the row's key is replaced.

``S <- diag(exp(g)) S;  S <- S + k (beta (v - S^T k))^T`` with ``beta = sigmoid(x Wb)`` and
``g = -exp(A_log) softplus(W2 (W1 x) + dt_bias)``: one beta and one A_log for each head, dt_bias for each key channel.

Every memory has its own W1, which maps a token to 16 numbers a head; all memories share W2, one matrix for each head,
as the rule gla has its gate. In the paper's layer and in flash-linear-attention's, W1 gives as many numbers as a value
of one head has, for all heads together. 16 for each head let tensor parallelism split the gate by head, as it splits
keys, and make about as many numbers: 64 for 4 heads, 128 for 8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.common.reference import unit_length
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.channel_delta import initial_state_gradient as state_gradient
from mom_layers.recur.channel_delta import kimi_delta_attention
from mom_layers.recur.channel_delta.reference import channel_delta_rule_reference
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules.decay_rates import decay_rates
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs, dense_transition

RANK = 16


def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    """A_log, dt_bias, and the second map of the low-rank decay."""
    return {"A_log": (), "dt_bias": (head_dim,), "decay_up": (RANK, head_dim)}


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """Decay rates exp(A_log) uniform in [1, 16], time steps log-uniform in [1e-3, 1e-1], decay_up as a linear map."""
    rates = decay_rates(num_heads, lowest=1.0, channels=(head_dim,))
    return rates | {"decay_up": torch.empty(num_heads, RANK, head_dim).uniform_(-(RANK**-0.5), RANK**-0.5)}


def log_decay(raw: torch.Tensor, parameters, kernels: str) -> torch.Tensor:
    """``g = -exp(A_log) softplus(W2 raw + dt_bias)``, [R, H, K] in float32 or more.

    Args:
        raw: [R, H * rank], W1 x.
        parameters: A_log [H], dt_bias [H, K], decay_up [H, rank, K].
        kernels: "auto", "torch" or "triton".
    """
    if resolve_kernels(kernels, raw) == "triton":
        from mom_layers.recur.channel_delta.gates_triton import low_rank_decay_triton

        return low_rank_decay_triton(raw, *(parameters[name] for name in ("A_log", "dt_bias", "decay_up")))
    dtype = compute_dtype(raw.dtype)
    rate, bias, up = (parameters[name].to(dtype) for name in ("A_log", "dt_bias", "decay_up"))
    low_rank = raw.to(dtype).unflatten(1, up.shape[:2])
    return -rate.exp()[:, None] * F.softplus(torch.einsum("rhd,hdk->rhk", low_rank, up) + bias)


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    beta = torch.sigmoid(raw["beta"].to(compute_dtype(raw["beta"].dtype)))
    return RuleInputs(q, k, v, {"g": log_decay(raw["decay"], parameters, kernels), "beta": beta})


def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
    return kimi_delta_attention(
        inputs.q, inputs.k, inputs.v, inputs.gates["g"], inputs.gates["beta"], cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, kernels=kernels,
    )  # fmt: skip


def initial_state_gradient(inputs: RuleInputs, do, cu_seqlens, initial_state, kernels):
    """Without values: the output is linear in the initial state."""
    return state_gradient(
        inputs.q, inputs.k, inputs.gates["g"], inputs.gates["beta"], do, cu_seqlens, kernels=kernels
    )  # fmt: skip


def reference_decay(raw, parameters):
    """The log decay of the plain loop, in the type of the raw gate."""
    up = parameters["decay_up"]
    logits = torch.einsum("rhd,hdk->rhk", raw["decay"].unflatten(1, up.shape[:2]), up) + parameters["dt_bias"]
    return -parameters["A_log"].exp()[:, None] * F.softplus(logits)


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gates, on q and k before they are brought to unit length."""
    g, beta = reference_decay(raw, parameters), torch.sigmoid(raw["beta"])
    return channel_delta_rule_reference(unit_length(q), unit_length(k), v, g, beta, beta, cu_seqlens, initial_state)


def recurrence_flops(rows: int, heads: int, k_dim: int, v_dim: int) -> float:
    """Forward operations of the chunked form, per row and head, full chunks, and the low-rank decay's second product.

    The products of erased keys and of queries with keys (2 C K each), the triangular solve (C (K + V)), scores times
    what is written (2 C V), and the three products with the state (2 K V each).
    """
    per_row = 4 * CHUNK * k_dim + CHUNK * (k_dim + v_dim) + 2 * CHUNK * v_dim + 6 * k_dim * v_dim + 2 * RANK * k_dim
    return float(rows) * heads * per_row


RULE = MemoryRule(
    name="kda",
    raw_gates=(RawGate("beta", columns=1, hf="b"), RawGate("decay", columns=RANK, hf="f")),
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
    family="channel_delta",
)
