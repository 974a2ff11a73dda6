"""Mamba2 (arXiv 2405.21060): a time step for each row and head decides what is forgotten and how much is written.

``S <- exp(g) S + k (dt v)^T;  o = q^T S + D v`` with ``dt = softplus(x Wdt + dt_bias)`` and ``g = -exp(A_log) dt``. The
paper's C, B and x are q, k and v. Every head has its own keys, where the paper's heads share them in groups: so tensor
parallelism can split the heads.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.rules.decay_rates import decay_rates
from mom_layers.recur.rules.rule import RawGate, RuleInputs
from mom_layers.recur.rules.scalar_decay import plain_loop, scalar_decay_rule


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """As Mamba2: rates uniform in [1, 16], time steps log-uniform in [1e-3, 1e-1], a skip of one."""
    return decay_rates(num_heads, lowest=1.0) | {"D": torch.ones(num_heads)}


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    """g and dt [R, H] in float32 or float64."""
    dtype = compute_dtype(raw["dt"].dtype)
    dt = F.softplus(raw["dt"].to(dtype) + parameters["dt_bias"].to(dtype))
    return RuleInputs(q, k, v, {"g": -parameters["A_log"].to(dtype).exp() * dt, "dt": dt, "D": parameters["D"]})


def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
    v, dt, skip = inputs.v, inputs.gates["dt"], inputs.gates["D"]
    written = replace(inputs, v=(dt[..., None] * v).to(v.dtype))
    o, state = _WITHOUT_SKIP.recur(written, cu_seqlens, initial_state, output_final_state, kernels)
    return (o + skip.to(dt.dtype)[:, None] * v).to(v.dtype), state


def loop_inputs(q, k, v, raw, parameters):
    dt = F.softplus(raw["dt"] + parameters["dt_bias"])
    return q, k, dt[..., None] * v, -parameters["A_log"].exp() * dt


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gates, and the skip."""
    o, states = plain_loop(*loop_inputs(q, k, v, raw, parameters), cu_seqlens, initial_state, scale=1.0)
    return o + parameters["D"][:, None] * v, states


_WITHOUT_SKIP = scalar_decay_rule(
    "mamba2", prepare, loop_inputs, scale=1.0, raw_gates=(RawGate("dt", columns=1, hf="dt"),),
    parameter_shapes=lambda head_dim: {"A_log": (), "dt_bias": (), "D": ()}, init_parameters=init_parameters,
)  # fmt: skip
RULE = replace(_WITHOUT_SKIP, recur=recur, reference=reference)
