"""DeltaNet (arXiv 2102.11174, 2406.06484): replace the value that the state holds for the row's key, forget no other.

``S <- S + k (beta (v - k^T S))^T`` with ``beta = sigmoid(x Wb)``, by the kernels of the gated delta rule with a log
decay of zero: four bytes a row and head.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.reference import unit_length
from mom_layers.recur.rules import gated_deltanet
from mom_layers.recur.rules.rule import RawGate, RuleInputs
from mom_layers.recur.rules.scalar_decay import no_parameters


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    beta = torch.sigmoid(raw["beta"].to(compute_dtype(raw["beta"].dtype)))
    return RuleInputs(q, k, v, {"g": torch.zeros_like(beta), "beta": beta})


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gate, on q and k before they are brought to unit length."""
    beta = torch.sigmoid(raw["beta"])
    return gated_deltanet.gated_delta_rule_reference(
        unit_length(q), unit_length(k), v, torch.zeros_like(beta), beta, cu_seqlens, initial_state
    )


RULE = replace(
    gated_deltanet.RULE,
    name="deltanet",
    raw_gates=(RawGate("beta", columns=1, hf="b"),),
    parameter_shapes=no_parameters,
    init_parameters=no_parameters,
    prepare=prepare,
    reference=reference,
    decode_step=None,
)
