"""Tiles, warps and pipeline stages of gated linear attention's kernels, in one table."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """tile: columns of V that a recurrence holds, rows of the state that the state gradients hold, or columns of K or V
    that the others take at a time."""

    tile: int
    num_warps: int
    num_stages: int


# 16 bits: the fastest of a few that were timed on an H200 with heads of 256; rows of other sizes follow what the
# compiler reports (registers, spills, shared memory). float32 runs outside the tensor cores and is meant for
# comparisons. A recurrence's row goes by K, the state gradients' by V.
LAUNCHES = {
    "16 bits": {
        "decayed_rows": Launch(64, 4, 1),
        "scores": Launch(64, 4, 1),
        "recurrence_256": Launch(64, 8, 2),
        "recurrence_128": Launch(64, 8, 2),
        "recurrence_64": Launch(64, 4, 2),
        "state_gradients_256": Launch(64, 8, 1),
        "state_gradients_128": Launch(32, 4, 1),
        "state_gradients_64": Launch(32, 4, 1),
        "score_gradients": Launch(64, 4, 2),
        "query_key_gradients": Launch(16, 1, 1),
    },
    "float32": {
        "decayed_rows": Launch(32, 4, 1),
        "scores": Launch(32, 4, 1),
        "recurrence_256": Launch(16, 16, 1),
        "recurrence_128": Launch(16, 8, 1),
        "recurrence_64": Launch(16, 8, 1),
        "state_gradients_256": Launch(16, 16, 1),
        "state_gradients_128": Launch(16, 8, 1),
        "state_gradients_64": Launch(16, 8, 1),
        "score_gradients": Launch(32, 8, 1),
        "query_key_gradients": Launch(32, 8, 1),
    },
}


def launch_for(kernel: str, like: torch.Tensor, size: int, of_table: int | None = None) -> Launch:
    """A kernel's row for inputs such as ``like``, its tile no wider than ``size``.

    of_table: the head size that names the row, for kernels that have one a size; those below 64 run as 64 does.
    """
    name = kernel if of_table is None else f"{kernel}_{max(64, of_table)}"
    launch = LAUNCHES["float32" if like.dtype == torch.float32 else "16 bits"][name]
    return launch._replace(tile=min(launch.tile, size))
