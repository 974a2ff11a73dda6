"""Checks that every public call makes: of an argument's type, which the host reads, and of the values in a tensor.

Values in tensors are checked always on the CPU, and on a GPU where the user asks for the check. A value on a GPU
reaches the host only when the GPU has finished its work, so a check there slows training down, and a CUDA graph cannot
hold the check. ``MOM_CHECK=1`` in the environment switches the checks on for GPUs.
"""

from __future__ import annotations

import math
import operator
import os

import torch

LARGEST_SIZE = 2**24
"""Of a layer's sizes: far above what memory holds, so that no product of sizes overflows in PyTorch."""
FLOATING, WHOLE, TRUTH = "floating-point numbers", "int32 or int64", "bool"


def _is(tensor: torch.Tensor, kind: str) -> bool:
    if kind == FLOATING:
        return tensor.is_floating_point()
    return tensor.dtype in ((torch.bool,) if kind == TRUTH else (torch.int32, torch.int64))


def check_tensors(kind: str, device: torch.device | None = None, /, **tensors: object) -> None:
    """Raises TypeError for an argument that is no tensor, and ValueError for one of another type or on another device.

    Args:
        kind: FLOATING, WHOLE or TRUTH.
        device: where the tensors must be; anywhere when absent.
        tensors: by the names of their arguments.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a tensor of {kind}, got {_shown(tensor)}")
        if not _is(tensor, kind):
            raise ValueError(f"{name} must be a tensor of {kind}, got {tensor.dtype}")
        if device is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} as the other tensors are, got {tensor.device}")


def check_whole(least: int, most: int = LARGEST_SIZE, /, **values: object) -> None:
    """Raises TypeError for an argument that is no whole number, and ValueError outside of ``least`` to ``most``."""
    for name, value in values.items():
        try:
            number = operator.index(value)
        except TypeError as error:
            raise TypeError(f"{name} must be a whole number, got {_shown(value)}") from error
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        if number > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")


def check_number(**values: object) -> None:
    """Raises TypeError for an argument that is no number, and ValueError for NaN and infinity."""
    for name, value in values.items():
        if isinstance(value, str) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} must be a number, got {_shown(value)}")
        if not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value}")


def check_truth(**values: object) -> None:
    """Raises TypeError for an argument that is neither True nor False: a text such as "no" would count as True."""
    for name, value in values.items():
        if value not in (True, False):
            raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def check_instance(kind: type, **values: object) -> None:
    """Raises TypeError for an argument that is not of a class."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {_shown(value)}")


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else f'{text[:57]}...'} ({type(value).__name__})"


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
    values = borders.tolist() if borders.dim() == 1 else []
    if not values:
        raise ValueError(f"{name} must be [S + 1], got {list(borders.shape)}")
    if values[0] != 0 or values[-1] != total or any(a > b for a, b in zip(values, values[1:], strict=False)):
        shown = values if len(values) <= 12 else [*values[:6], "...", *values[-6:]]
        raise ValueError(f"{name} must start at 0, never decrease and end at {total}, got {shown}")


def check_range(least: int, end: int, /, **tensors: torch.Tensor) -> None:
    """Raises ValueError for a tensor of whole numbers with a value outside of ``least`` to ``end - 1``."""
    for name, tensor in tensors.items():
        if tensor.numel() and checks_values(tensor):
            low, high = int(tensor.min()), int(tensor.max())
            if low < least or high >= end:
                raise ValueError(f"{name} must hold numbers from {least} to {end - 1}, got {low} to {high}")
