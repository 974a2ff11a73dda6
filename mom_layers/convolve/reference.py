"""The plain loop of the convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.reference import bounds, unit_length


def segment_convolution_reference(rows, weight, cu_seqlens, unit_length_heads=None, initial_tail=None, silu=True):
    """rows [R, C]; weight [C, W]; initial_tail [S, W - 1, C]. Returns y [R, C] and the final tail [S, W - 1, C].

    Depthwise causal convolution inside each segment, SiLU unless ``silu`` is False, and unit length per head where
    heads are given.
    """
    channels, width = weight.shape
    out, tails = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        before = rows.new_zeros(width - 1, channels) if initial_tail is None else initial_tail[segment]
        history = torch.cat([before, rows[first:last]])
        for t in range(last - first):
            y = (history[t : t + width] * weight.t()).sum(0)
            y = F.silu(y) if silu else y
            out.append(y if unit_length_heads is None else unit_length(y.view(unit_length_heads, -1)).flatten())
        tails.append(history[history.shape[0] - (width - 1) :])
    y = torch.stack(out) if out else rows.new_zeros(0, channels)
    return y, torch.stack(tails)
