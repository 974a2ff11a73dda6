"""Norms of a machine without Transformer Engine."""

from types import SimpleNamespace

import pytest
import torch

from linear_moe.layer.norm import TorchNorm


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_a_zero_centered_norm_starts_as_the_plain_one(normalization):
    """--apply-layernorm-1p: the stored weight is the factor's difference from 1."""
    norms = [
        TorchNorm(
            SimpleNamespace(
                normalization=normalization, layernorm_zero_centered_gamma=zero_centered, sequence_parallel=True
            ),
            16,
            1e-5,
        )
        for zero_centered in (False, True)
    ]
    x = torch.randn(3, 16)
    plain, centered = (norm(x) for norm in norms)
    assert not norms[1].weight.any() and norms[1].weight.sequence_parallel
    torch.testing.assert_close(centered, plain)
    with torch.no_grad():
        norms[0].weight += 0.5
        norms[1].weight += 0.5
    torch.testing.assert_close(norms[1](x), norms[0](x))
