"""The plain loop that mixes what the memories answer."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def combine_reference(o, weights, row_of_choice, gate, norm_weight, eps):
    """o [R, H, V]; weights [N, k]; row_of_choice [N, choices]; gate [N, H, V]; norm_weight [V]. Returns y [N, H, V].

    y_t = sum_m w_t^m o_t^m + o_t^shared;  RMSNorm over V of every head, times SiLU(gate).
    """
    out = []
    for token, row_ids in enumerate(row_of_choice.tolist()):
        mixed = 0.0
        for choice, row in enumerate(row_ids):
            mixed = mixed + (weights[token, choice] * o[row] if choice < weights.shape[1] else o[row])
        mixed = mixed * torch.rsqrt((mixed * mixed).mean(-1, keepdim=True) + eps) * norm_weight
        out.append(mixed * F.silu(gate[token]))
    return torch.stack(out)
