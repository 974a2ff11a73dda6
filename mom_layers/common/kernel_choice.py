"""The choice between an operation's implementations, which every operation takes as its argument ``kernels``.

``"torch"``: plain PyTorch, on any device and in float64 too. No Triton kernel is launched.
``"triton"``: Triton kernels, on a CUDA device, or on a CPU in Triton's interpreter. They take no float64.
``"auto"``: ``"triton"`` for tensors on a CUDA device, ``"torch"`` for all others.
"""

from __future__ import annotations

import torch

KERNELS = ("auto", "torch", "triton")


def check_kernels(kernels: str) -> None:
    """Raises ValueError for a name that is not in KERNELS."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(map(repr, KERNELS))}, got {kernels!r}")


def resolve_kernels(kernels: str, tensor: torch.Tensor) -> str:
    """Replaces ``"auto"`` by the implementation for the tensor's device.

    Args:
        kernels: "auto", "torch" or "triton".
        tensor: an input of the operation.

    Returns:
        "torch" or "triton".

    Raises:
        ValueError: another name.
    """
    check_kernels(kernels)
    if kernels == "auto":
        # What is no tensor is refused by the operation's own checks, with the argument's name.
        return "triton" if getattr(tensor, "is_cuda", False) else "torch"
    return kernels


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are computed: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32
