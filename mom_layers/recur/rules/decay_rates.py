"""The initial decay rates and time steps of Mamba2 (arXiv 2405.21060), which Gated DeltaNet took over."""

from __future__ import annotations

import math

import torch

# The range of time steps that Mamba2 and Gated DeltaNet start from.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
A_MAX = 16.0


def decay_rates(num_heads: int, lowest: float) -> dict[str, torch.Tensor]:
    """A_log and dt_bias [H]: rates exp(A_log) uniform from ``lowest`` to 16, time steps softplus(dt_bias) log-uniform
    in [1e-3, 1e-1]."""
    rate = torch.empty(num_heads).uniform_(lowest, A_MAX)
    step = torch.exp(torch.empty(num_heads).uniform_(math.log(DT_MIN), math.log(DT_MAX))).clamp(min=DT_FLOOR)
    inverse_softplus = step + torch.log(-torch.expm1(-step))
    return {"A_log": rate.log(), "dt_bias": inverse_softplus}
