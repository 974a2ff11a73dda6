"""Layer norms in plain PyTorch with sequence parallelism, which megatron-core's PyTorch norms refuse."""

from __future__ import annotations

import torch

_NORMS = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}


class TorchNorm:
    """Builds a torch LayerNorm or RMSNorm whose parameters Megatron reduces over the tensor-parallel group.

    Raises ValueError for a normalization that PyTorch lacks.
    """

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, **_):
        if config.normalization not in _NORMS:
            raise ValueError(f"--normalization must be one of {', '.join(_NORMS)}, got {config.normalization!r}")
        if config.layernorm_zero_centered_gamma:
            raise ValueError("--apply-layernorm-1p needs Transformer Engine: use --transformer-impl transformer_engine")
        norm = _NORMS[config.normalization](hidden_size, eps=eps)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
