"""Which set of kernels a family of recurrences runs on a chip: the first of its sets that takes chip, type and sizes.

A kernel set is a module, or a folder of modules, of one family. Every set of a family has the same functions, and:

    NAME                                      how the log names the set
    takes(chip, dtype, k_dim, v_dim) -> bool  whether the set runs there; the last set of a family takes everything
    problem() -> str | None                   only where a set needs more than Triton: why it does not run here
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch

from mom_layers.common.chips import Chip, forced_kernel_set

logger = logging.getLogger(__name__)


class Table(Protocol):
    """A set's tiles, warps and stages for every kernel and head size.

    Attributes:
        name: how the log names the table.
        shared_memory: bytes, the most that one of the kernels takes.
    """

    name: str
    shared_memory: int


def choose(family: str, sets: Sequence[ModuleType], chip: Chip, dtype: torch.dtype, k_dim: int, v_dim: int):
    """The first of ``sets`` that takes this chip, type and head size and has no problem. Logs the choice.

    Where `mom_layers.common.chips.forced` names one of the sets, that set alone is considered, on any chip. Callers
    cache the answer (`cached_choice`), so that the log says once which set was taken.

    Raises:
        RuntimeError: the set that was named has a problem.
    """
    name = forced_kernel_set()
    named = [kernels for kernels in sets if kernels.NAME == name]
    for kernels in named or sets:
        if not named and not kernels.takes(chip, dtype, k_dim, v_dim):
            continue
        problem = kernels.problem() if hasattr(kernels, "problem") else None
        if problem is None:
            logger.info("%s: %s kernels for %s, %s, K %d, V %d", family, kernels.NAME, chip.name, dtype, k_dim, v_dim)
            return kernels
        logger.warning("%s: the %s kernels do not run, and slower ones do: %s", family, kernels.NAME, problem)
    raise RuntimeError(f"{family}: the {name} kernels do not run: {problem}")


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
