"""Checks of values, and not of shapes alone: always on the CPU, and on a GPU where the user asks for them.

A value on a GPU reaches the host only when the GPU has finished its work, so a check there slows training down, and a
CUDA graph cannot hold the check. ``MOM_CHECK=1`` in the environment switches the checks on for GPUs.
"""

from __future__ import annotations

import os

import torch


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are checked on its device."""
    if tensor.device.type == "cpu":
        return not torch.compiler.is_compiling()
    return tensor.device.type == "cuda" and os.environ.get("MOM_CHECK", "0") not in ("", "0")


def check_borders(borders: torch.Tensor, total: int, name: str = "cu_seqlens") -> None:
    """Raises ValueError for borders that do not start at 0, that decrease, or that do not end at ``total``.

    Args:
        borders: [S + 1] integers.
        total: rows or tokens in all.
        name: of the argument, for the message.
    """
    if not checks_values(borders):
        return
    values = borders.tolist()
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:], strict=False)):
        shown = values if len(values) <= 12 else [*values[:6], "...", *values[-6:]]
        raise ValueError(f"{name} must start at 0, never decrease and end at {total}, got {shown}")
