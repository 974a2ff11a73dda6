"""A folder of checkpoints: which iterations are complete, and the error that names a folder that cannot be used."""

import json
import logging
import os
import re
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

PYTORCHS_FORMATS = ("fsdp_dtensor", "torch_dcp")
"""Values of --ckpt-format whose checkpoints have no metadata.json."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read."""


@cache
def warn(message: str) -> None:
    """Logs a warning once, and on the first rank only: all ranks read the same files."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning("warning: %s", message)


def iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def is_complete(checkpoint: Path) -> bool:
    """Whether a folder holds a checkpoint whose writing ended. The last file written is metadata.json in torch_dist,
    and .metadata in a run whose --ckpt-format is one of PyTorch's.
    """
    with suppress(OSError, ValueError):
        if not any(word.rpartition("=")[2] in PYTORCHS_FORMATS for word in sys.argv):
            json.loads((checkpoint / "metadata.json").read_text())
        return (checkpoint / ".metadata").stat().st_size > 0
    return False


def complete_iterations(folder: Path) -> list[int]:
    """Iterations of the complete checkpoints in a folder, the oldest first."""
    names = [path.name for path in folder.glob("iter_*") if is_complete(path)]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,}", name))
