"""Feature maps of linear attention: what q and k become before the recurrence.

Shape legend: rows R, heads H, key size K.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

WHOLE = 32  # features come in whole groups of this many, filled up with zeros, as the kernels' tiles are


def elu(x: torch.Tensor) -> torch.Tensor:
    """elu(x) + 1: exp(x) below zero, x + 1 above (arXiv 2006.16236)."""
    return F.elu(x) + 1


def num_squares(head_dim: int) -> int:
    """Products x_i x_j with i <= j."""
    return head_dim * (head_dim + 1) // 2


def rebased_features(head_dim: int) -> int:
    """Features of :func:`squares`, filled up."""
    return -(-num_squares(head_dim) // WHOLE) * WHOLE


def taylor_features(head_dim: int) -> int:
    """Features of :func:`taylor`, filled up."""
    return -(-(1 + head_dim + num_squares(head_dim)) // WHOLE) * WHOLE


@functools.cache
def _pairs(head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices [K, K (K + 1) / 2] that select x_i and x_j of every product, and hold its factor: the squares first,
    then i < j row by row.

    A product with a matrix of zeros and one number a column selects exactly, and its backward pass adds up in a fixed
    order.
    """
    i, j = torch.triu_indices(head_dim, head_dim, 1)
    whole = torch.arange(head_dim)
    first, second = (F.one_hot(torch.cat([whole, rows]), head_dim).t() for rows in (i, j))
    factor = torch.cat([torch.ones(head_dim), torch.full(i.shape, 2.0)]).double().sqrt() / head_dim**0.5
    with torch.inference_mode(False):  # the matrices outlive the call, and later calls may differentiate
        return first.to(device, dtype).clone(), (second * factor).to(device, dtype)


def squares(x: torch.Tensor) -> torch.Tensor:
    """x [R, H, K] -> f(x) [R, H, K (K + 1) / 2] with f(q) . f(k) = (q . k)^2 / K."""
    first, second = _pairs(x.shape[-1], x.dtype, x.device)
    return (x @ first) * (x @ second)


def filled(features: torch.Tensor) -> torch.Tensor:
    """Features with zeros up to whole groups."""
    return F.pad(features, (0, -features.shape[-1] % WHOLE))


def taylor(x: torch.Tensor) -> torch.Tensor:
    """x [R, H, K] -> f(x) with f(q) . f(k) = 1 + q . k / sqrt(K) + (q . k)^2 / (2 K), the start of exp's Taylor series
    (Based, arXiv 2402.18668), filled up."""
    linear = x / x.shape[-1] ** 0.25
    return filled(torch.cat([torch.ones_like(x[..., :1]), linear, squares(x) * 2**-0.5], dim=-1))
