"""Rebased (arXiv 2402.10644): normalised linear attention whose feature map holds all products of two channels.

``f(q) . f(k) = (y_q . y_k)^2 / K`` with ``y = key_scale LayerNorm(x) + key_shift``, one scale and shift for each head,
for q and for k. The paper's key size is 16: 136 features, which are filled up to 160.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.recur.rules.feature_maps import filled, rebased_features, squares
from mom_layers.recur.rules.rule import RuleInputs
from mom_layers.recur.rules.scalar_decay import scalar_decay_rule

KEY_SIZE = 16
EPS = 1e-5
NORM_EPS = 1e-5


def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    """The scale and the shift after the norm."""
    return {"key_scale": (head_dim,), "key_shift": (head_dim,)}


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """One and zero."""
    return {"key_scale": torch.ones(num_heads, head_dim), "key_shift": torch.zeros(num_heads, head_dim)}


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    dtype = compute_dtype(q.dtype)
    scale, shift = parameters["key_scale"].to(dtype), parameters["key_shift"].to(dtype)

    def features(x):
        y = F.layer_norm(x.to(dtype), x.shape[-1:], eps=NORM_EPS) * scale + shift
        return filled(squares(y.to(x.dtype)))

    return RuleInputs(features(q), features(k), v, {})


def loop_inputs(q, k, v, raw, parameters):
    def features(x):
        size = x.shape[-1]
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        y = y * parameters["key_scale"] + parameters["key_shift"]
        i, j = torch.triu_indices(size, size, 1)
        products = torch.cat([y * y, 2**0.5 * y[..., i] * y[..., j]], -1) / size**0.5
        return torch.cat([products, y.new_zeros(*y.shape[:-1], rebased_features(size) - products.shape[-1])], -1)

    return features(q), features(k), v, None


RULE = scalar_decay_rule(
    "rebased", prepare, loop_inputs, scale=1.0, eps=EPS, features=rebased_features, key_sizes=(KEY_SIZE,),
    parameter_shapes=parameter_shapes, init_parameters=init_parameters,
)  # fmt: skip
