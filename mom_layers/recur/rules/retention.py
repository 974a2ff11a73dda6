"""Retention (RetNet, arXiv 2307.08621): every head forgets at a fixed rate of its own.

``S <- (1 - 2^(-5 - h)) S + k v^T`` for head h = 0 .. H - 1. The logs of the decays are parameters that are not trained:
so every head takes its own decay along to another rank or checkpoint. The paper's rotary positions are left out: the
convolutions tell near rows apart.
"""

from __future__ import annotations

import torch

from mom_layers.recur.rules.rule import RuleInputs
from mom_layers.recur.rules.scalar_decay import scalar_decay_rule


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """log(1 - 2^(-5 - h))."""
    heads = torch.arange(num_heads, dtype=torch.float64)
    return {"log_decay": torch.log1p(-torch.exp2(-5.0 - heads)).float()}


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    return RuleInputs(q, k, v, {"g": parameters["log_decay"]})


def loop_inputs(q, k, v, raw, parameters):
    return q, k, v, parameters["log_decay"]


FIXED_DECAY = {"parameter_shapes": lambda head_dim: {"log_decay": ()}, "fixed_parameters": ("log_decay",)}
RULE = scalar_decay_rule("retention", prepare, loop_inputs, init_parameters=init_parameters, **FIXED_DECAY)
