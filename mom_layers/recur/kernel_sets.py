"""Which set of kernels a family of recurrences runs on a chip: the first of its sets that takes chip, type and sizes.

A kernel set is a module, or a folder of modules, of one family. Every set of a family has the same functions, and:

    NAME                                      how the log names the set
    takes(chip, dtype, k_dim, v_dim) -> bool  whether the set runs there; the last set of a family takes everything
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

# Shared memory of a multiprocessor that one program may use, in bytes, where no device can be asked: an A100's.
INTERPRETER_SHARED_MEMORY = 163 * 1024


@dataclass(frozen=True)
class Chip:
    """What the choice of kernels depends on.

    Attributes:
        name: of the device, as its driver tells it.
        capability: major and minor compute capability; (0, 0) in Triton's interpreter.
        shared_memory: bytes that one program may use.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device; a stand-in for the CPU, where Triton's interpreter runs the kernels."""
    if device.type != "cuda":
        return Chip("Triton's interpreter", (0, 0), INTERPRETER_SHARED_MEMORY)
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return Chip(properties.name, capability, properties.shared_memory_per_block_optin)


def choose(family: str, sets: Sequence[ModuleType], chip: Chip, dtype: torch.dtype, k_dim: int, v_dim: int):
    """The first of ``sets`` that takes this chip, type and head size. Logs the choice.

    Callers cache the answer (`functools.cache`), so that the log says once which set was taken.
    """
    chosen = next(kernels for kernels in sets if kernels.takes(chip, dtype, k_dim, v_dim))
    logger.info("%s: %s kernels for %s, %s, K %d, V %d", family, chosen.NAME, chip.name, dtype, k_dim, v_dim)
    return chosen
