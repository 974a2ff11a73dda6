"""Gated DeltaNet-2 (arXiv 2605.22791): Kimi Delta Attention (the rule kda) whose single beta becomes an erase strength
for every key channel and a write strength for every value channel.

``S <- diag(exp(g)) S;  S <- S + k (w v - S^T (b k))^T`` with ``b = sigmoid(x Wb)`` of K numbers a head and
``w = sigmoid(x Ww)`` of V numbers a head, both of full rank as in flash-linear-attention's layer. The decay g is the
rule kda's, low-rank as there.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.reference import unit_length
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.channel_delta import gated_delta_rule_2
from mom_layers.recur.channel_delta import initial_state_gradient as state_gradient
from mom_layers.recur.channel_delta.reference import channel_delta_rule_reference
from mom_layers.recur.rules import kda
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs, dense_transition


def strength(raw: torch.Tensor, heads: int) -> torch.Tensor:
    """The sigmoid of a raw gate [R, H * size], [R, H, size] in raw's type."""
    return torch.sigmoid(raw.to(compute_dtype(raw.dtype))).to(raw.dtype).unflatten(1, (heads, -1))


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    heads = v.shape[1]
    gates = {"b": strength(raw["erase"], heads), "w": strength(raw["write"], heads)}
    return RuleInputs(q, k, v, {"g": kda.log_decay(raw["decay"], parameters, kernels), **gates})


def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
    gates = inputs.gates
    return gated_delta_rule_2(
        inputs.q, inputs.k, inputs.v, gates["g"], gates["b"], gates["w"], cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, kernels=kernels,
    )  # fmt: skip


def transition(inputs: RuleInputs, cu_seqlens, kernels):
    """A segment's K x K transition. Its values are zero and K long, so that one write strength a head serves."""
    no_write = {"w": torch.zeros_like(inputs.gates["g"][..., 0])}
    return dense_transition(recur)(replace(inputs, gates=inputs.gates | no_write), cu_seqlens, kernels)


def initial_state_gradient(inputs: RuleInputs, do, cu_seqlens, initial_state, kernels):
    """Without values: the output is linear in the initial state."""
    return state_gradient(inputs.q, inputs.k, inputs.gates["g"], inputs.gates["b"], do, cu_seqlens, kernels=kernels)


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gates, on q and k before they are brought to unit length."""
    g, heads = kda.reference_decay(raw, parameters), v.shape[1]
    b, w = (torch.sigmoid(raw[name]).unflatten(1, (heads, -1)) for name in ("erase", "write"))
    return channel_delta_rule_reference(unit_length(q), unit_length(k), v, g, b, w, cu_seqlens, initial_state)


RULE = MemoryRule(
    name="gated_deltanet2",
    raw_gates=(
        RawGate("erase", columns="key", hf="b"),
        RawGate("write", columns="value", hf="w"),
        RawGate("decay", columns=kda.RANK, hf="f"),
    ),
    parameter_shapes=kda.parameter_shapes,
    init_parameters=kda.init_parameters,
    prepare=prepare,
    recur=recur,
    transition=transition,
    reference=reference,
    recurrence_flops=kda.recurrence_flops,
    diagonal_transition=False,
    unit_length_keys=True,
    head_sizes=HEAD_SIZES,
    initial_state_gradient=initial_state_gradient,
    family="channel_delta",
)
