"""Linear attention (arXiv 2006.16236): the state keeps everything. ``S <- S + f(k) v^T``, f a feature map.

Five rules: without a feature map (identity), with elu(x) + 1 or relu(x), and with these two normalised. Normalised
without a feature map is left out: its divisor may be zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.recur.rules.feature_maps import elu
from mom_layers.recur.rules.rule import MemoryRule, RuleInputs
from mom_layers.recur.rules.scalar_decay import scalar_decay_rule

EPS = 1e-10
"""Added to the divisor of normalised rules, as in flash-linear-attention."""


def _rule(name: str, feature_map=None, loop_map=None, eps: float | None = None) -> MemoryRule:
    def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
        return RuleInputs(*((q, k) if feature_map is None else (feature_map(q), feature_map(k))), v, {})

    def loop_inputs(q, k, v, raw, parameters):
        return (*((q, k) if loop_map is None else (loop_map(q), loop_map(k))), v, None)

    return scalar_decay_rule(name, prepare, loop_inputs, eps=eps)


def _elu_by_definition(x):
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def _relu_by_definition(x):
    return x.clamp(min=0)


RULES = (
    _rule("linear_attention"),
    _rule("linear_attention_elu", elu, _elu_by_definition),
    _rule("linear_attention_elu_normalised", elu, _elu_by_definition, EPS),
    _rule("linear_attention_relu", F.relu, _relu_by_definition),
    _rule("linear_attention_relu_normalised", F.relu, _relu_by_definition, EPS),
)
