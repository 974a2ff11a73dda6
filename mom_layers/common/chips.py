"""The chips that the kernels are compiled for, the chip that a tensor's device is, and a way to run as if on another.

``MOM_CHIP=sm_86`` in the environment gives every device the tiles and kernel sets of that chip, and
``MOM_KERNEL_SET=general`` takes the kernel set of that name wherever a family has one; :func:`forced` does the same
inside a program. Both are for tests and measurements: kernels of another chip's instructions fail to compile.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Chip:
    """What the choice of kernels depends on.

    Attributes:
        name: of the device, as its driver tells it.
        capability: major and minor compute capability; (0, 0) in Triton's interpreter.
        shared_memory: bytes of a multiprocessor's shared memory that one program may use.
        vendor: "nvidia" or "amd", whose capabilities count something else.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int
    vendor: str = "nvidia"


def _kilobytes(count: int) -> int:
    return count * 1024


# By the name that compilers give the architecture. The shared memory is NVIDIA's "maximum for a thread block" of the
# compute capability, and AMD's local data share of a compute unit.
CHIPS = {
    "sm_80": Chip("A100", (8, 0), _kilobytes(163)),
    "sm_86": Chip("A40, RTX 3090", (8, 6), _kilobytes(99)),
    "sm_89": Chip("L40S, RTX 4090", (8, 9), _kilobytes(99)),
    "sm_90": Chip("H100, H200", (9, 0), _kilobytes(227)),
    "sm_100": Chip("B200, GB200", (10, 0), _kilobytes(227)),
    "sm_103": Chip("B300, GB300", (10, 3), _kilobytes(227)),
    "sm_120": Chip("RTX 5090, RTX PRO 6000", (12, 0), _kilobytes(99)),
    "gfx942": Chip("MI300X", (9, 4), _kilobytes(64), "amd"),
    "gfx950": Chip("MI355X", (9, 5), _kilobytes(160), "amd"),
}
# Stands for the CPU, where Triton's interpreter runs the kernels: with the shared memory of an A100.
INTERPRETER = Chip("Triton's interpreter", (0, 0), CHIPS["sm_80"].shared_memory)


@dataclass
class _Forced:
    chip: Chip | None = None
    kernel_set: str | None = None


_forced = _Forced()
_choices: list[Callable] = []


def cached_choice(choose: Callable) -> Callable:
    """`functools.cache` for a function whose result depends on the chip; :func:`forced` empties the cache."""
    choose = functools.cache(choose)
    _choices.append(choose)
    return choose


def _chip_named(name: str) -> Chip:
    if name not in CHIPS:
        raise ValueError(f"there is no chip {name!r}: choose one of {', '.join(CHIPS)}")
    return CHIPS[name]


@functools.cache
def _from_environment() -> _Forced:
    chip = os.environ.get("MOM_CHIP")
    return _Forced(_chip_named(chip) if chip else None, os.environ.get("MOM_KERNEL_SET") or None)


def forced_kernel_set() -> str | None:
    """The name of the kernel set that :func:`forced` or MOM_KERNEL_SET asks for; None without."""
    return _forced.kernel_set or _from_environment().kernel_set


@contextmanager
def forced(chip: str | Chip | None = None, kernel_set: str | None = None) -> Iterator[None]:
    """Inside, kernels are chosen as if every device were that chip, or as if a family had that set alone.

    Args:
        chip: a name of CHIPS, or a Chip.
        kernel_set: the set's NAME, as the log shows the set; families without such a set choose as ever.

    Raises:
        ValueError: a name that is not in CHIPS.
    """
    before = (_forced.chip, _forced.kernel_set)
    _forced.chip = _chip_named(chip) if isinstance(chip, str) else chip
    _forced.kernel_set = kernel_set
    try:
        _forget()
        yield
    finally:
        _forced.chip, _forced.kernel_set = before
        _forget()


def _forget() -> None:
    for choice in _choices:
        choice.cache_clear()


@functools.cache
def _chip_of(device: torch.device) -> Chip:
    if device.type != "cuda":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if torch.version.hip is not None:
        return Chip(properties.name, capability, properties.shared_memory_per_block, "amd")
    return Chip(properties.name, capability, properties.shared_memory_per_block_optin)


def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA (or ROCm) device, a stand-in for the CPU, or the chip that is forced."""
    return _forced.chip or _from_environment().chip or _chip_of(device)
