"""What the plain loops of several rooms share. The loops say what an operation means: faster code is compared with the
loops, never the other way round. The loops share nothing with faster paths, and differentiate through autograd.
"""

from __future__ import annotations

import torch


def bounds(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    """(first row, one past the last row) of every segment."""
    edges = cu_seqlens.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def unit_length(y: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """y / |y| over the last dimension."""
    return y * torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)
