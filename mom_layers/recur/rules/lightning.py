"""Lightning attention (arXiv 2401.04658): every head forgets at a fixed rate, and later layers forget less.

``S <- exp(-(8 h / H) (1 - l / L)) S + k v^T`` for head h = 0 .. H - 1 of layer l = 0 .. L - 1: head 0 never forgets.
"""

from __future__ import annotations

import torch

from mom_layers.recur.rules.retention import FIXED_DECAY, loop_inputs, prepare
from mom_layers.recur.rules.scalar_decay import scalar_decay_rule


def layer_parameters(num_heads: int, head_dim: int, layer: int, num_layers: int) -> dict[str, torch.Tensor]:
    """-(8 h / H) (1 - l / L)."""
    heads = torch.arange(num_heads, dtype=torch.float64)
    return {"log_decay": (-(8 * heads / num_heads) * (1 - layer / num_layers)).float()}


RULE = scalar_decay_rule(
    "lightning", prepare, loop_inputs, layer_parameters=layer_parameters,
    init_parameters=lambda num_heads, head_dim: layer_parameters(num_heads, head_dim, 0, 1), **FIXED_DECAY,
)  # fmt: skip
