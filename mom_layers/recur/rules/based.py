"""Based (arXiv 2402.18668): normalised linear attention whose feature map is the start of exp's Taylor series.

The paper's key size is 16: 153 features, which are filled up to 160.
"""

from __future__ import annotations

import torch

from mom_layers.recur.rules.feature_maps import taylor, taylor_features
from mom_layers.recur.rules.rule import RuleInputs
from mom_layers.recur.rules.scalar_decay import scalar_decay_rule

KEY_SIZE = 16
EPS = 1e-6


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    return RuleInputs(taylor(q), taylor(k), v, {})


def _features(x):
    """1, x, the squares and the products of two, filled up with zeros."""
    size = x.shape[-1]
    i, j = torch.triu_indices(size, size, 1)
    whole = [torch.ones_like(x[..., :1]), x / size**0.25, x * x / (2 * size) ** 0.5, x[..., i] * x[..., j] / size**0.5]
    features = torch.cat(whole, -1)
    return torch.cat([features, x.new_zeros(*x.shape[:-1], taylor_features(size) - features.shape[-1])], -1)


def loop_inputs(q, k, v, raw, parameters):
    return _features(q), _features(k), v, None


RULE = scalar_decay_rule(
    "based", prepare, loop_inputs, scale=1.0, eps=EPS, features=taylor_features, key_sizes=(KEY_SIZE,)
)  # fmt: skip
