"""Layer norms in plain PyTorch with what megatron-core's PyTorch norms refuse: sequence parallelism, and weights that
are stored as their difference from 1.
"""

from __future__ import annotations

import torch
from torch.nn import functional


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm whose factor is 1 + weight, with a weight that starts at 0 (--apply-layernorm-1p)."""

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            torch.nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose factor is 1 + weight, with a weight that starts at 0 (--apply-layernorm-1p)."""

    def reset_parameters(self) -> None:
        torch.nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight + 1, self.eps)


_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
_ZERO_CENTERED_NORMS = {"LayerNorm": ZeroCenteredLayerNorm, "RMSNorm": ZeroCenteredRMSNorm}


class TorchNorm:
    """Builds a torch LayerNorm or RMSNorm whose parameters Megatron reduces over the tensor-parallel group.

    Raises ValueError for a normalization that PyTorch lacks.
    """

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        if config.normalization not in _NORMS:
            raise ValueError(f"--normalization must be one of {', '.join(_NORMS)}, got {config.normalization!r}")
        norms = _ZERO_CENTERED_NORMS if config.layernorm_zero_centered_gamma else _NORMS
        norm = norms[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
