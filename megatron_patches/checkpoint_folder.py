"""A folder of checkpoints: which iterations are complete, and the error that names a folder that cannot be used."""

import json
import logging
import os
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)


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
    """Whether a folder holds a torch_dist checkpoint whose writing ended: metadata.json is the last file written."""
    with suppress(OSError, ValueError):
        json.loads((checkpoint / "metadata.json").read_text())
        return (checkpoint / ".metadata").stat().st_size > 0
    return False


def complete_iterations(folder: Path) -> list[int]:
    """Iterations of the complete torch_dist checkpoints in a folder, the oldest first."""
    names = [path.name for path in folder.glob("iter_*") if is_complete(path)]
    return sorted(int(name[5:]) for name in names if re.fullmatch(r"iter_\d{7,}", name))
