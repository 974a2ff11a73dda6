"""Which implementation of an operation runs: plain PyTorch (any device, float64 too) or Triton kernels."""

from __future__ import annotations

import torch

KERNELS = ("auto", "torch", "triton")


def check_kernels(kernels: str) -> None:
    """Raises ValueError for a name that is not in KERNELS."""
    if kernels not in KERNELS:
        raise ValueError(f"unknown kernels {kernels!r}: choose one of {', '.join(KERNELS)}")


def resolve_kernels(kernels: str, tensor: torch.Tensor) -> str:
    """Returns ``"torch"`` or ``"triton"``; ``"auto"`` means Triton on a CUDA device and PyTorch elsewhere.

    Raises ValueError for any other name.
    """
    check_kernels(kernels)
    if kernels == "auto":
        return "triton" if tensor.is_cuda else "torch"
    return kernels


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that sums are taken in: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
