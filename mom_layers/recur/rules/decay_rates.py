"""The initial decay rates and time steps of Mamba2 (arXiv 2405.21060), which Gated DeltaNet and KDA took over."""

from __future__ import annotations

import math

import torch

# The ranges that these rules start from: time steps, and the largest rate.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
A_MAX = 16.0


def decay_rates(num_heads: int, lowest: float, channels: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """A_log [H] and dt_bias [H, *channels]: rates exp(A_log) uniform from ``lowest`` to 16, time steps
    softplus(dt_bias) log-uniform in [1e-3, 1e-1]."""
    rate = torch.empty(num_heads).uniform_(lowest, A_MAX)
    step = torch.empty(num_heads, *channels).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp().clamp(min=DT_FLOOR)
    inverse_softplus = step + torch.log(-torch.expm1(-step))
    return {"A_log": rate.log(), "dt_bias": inverse_softplus}
