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
from typing import Protocol

import torch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Chip:
    """What the choice of kernels depends on.

    Attributes:
        name: of the device, as its driver tells it.
        capability: major and minor compute capability; (0, 0) in Triton's interpreter.
        shared_memory: bytes of a multiprocessor's shared memory that one program may use.
    """

    name: str
    capability: tuple[int, int]
    shared_memory: int


class Table(Protocol):
    """A set's tiles, warps and stages for every kernel and head size.

    Attributes:
        name: how the log names the table.
        shared_memory: bytes, the most that one of the kernels takes.
    """

    name: str
    shared_memory: int


# Stands for the CPU, where Triton's interpreter runs the kernels: with the shared memory of an A100.
INTERPRETER = Chip("Triton's interpreter", (0, 0), 163 * 1024)


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device; a stand-in for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
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


def widest_that_fits(family: str, tables: Sequence[Table], chip: Chip) -> Table:
    """The first table whose kernels fit the chip's shared memory. Logs the choice; callers cache the answer.

    Args:
        family: how the log names the kernels.
        tables: from the widest tiles to the narrowest.
        chip: where the kernels run.

    Returns:
        The narrowest, with a warning, where none fits: kernels for smaller heads take less, and may run.
    """
    for table in tables:
        if table.shared_memory <= chip.shared_memory:
            logger.info("%s: %s for %s with %d bytes", family, table.name, chip.name, chip.shared_memory)
            return table
    logger.warning(
        "%s: %s has %d bytes of shared memory a program, and the kernels take up to %d: where a launch fails, choose "
        "smaller heads or kernels='torch'",
        family, chip.name, chip.shared_memory, tables[-1].shared_memory,
    )  # fmt: skip
    return tables[-1]
