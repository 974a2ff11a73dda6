"""Tiles, warps and pipeline stages of the gated delta rule's kernels, in one table."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """tile: columns of V that a program of a recurrence holds, rows of the state that one of the state gradients holds,
    or columns that a loop over K or V takes at a time. registers: of a thread at most, None for the compiler's choice.
    """

    tile: int
    num_warps: int
    num_stages: int
    registers: int | None = None


# hopper: the fastest of the few that were timed on an H200. At K = 256 the widest recurrence whose state fits the
#   registers and whose tiles fit 227 KB; below that, two programs share a multiprocessor, one waiting while the other
#   multiplies. The rest is chosen from what the compiler reports (registers, spills, shared memory) and not yet timed.
# other (Ampere): 163 KB, and both operands of a product pass through registers, so narrower tiles or more warps.
# float32: exact products run outside the tensor cores. Meant for comparisons: the tiles that spill least.
LAUNCHES = {
    "hopper": {
        "chunk_scores": Launch(64, 4, 3),
        "recurrence_256": Launch(128, 8, 2),
        "recurrence_128": Launch(64, 4, 2),
        "recurrence_64": Launch(64, 4, 2),
        "state_gradients_256": Launch(128, 8, 1),
        "state_gradients_128": Launch(64, 4, 1),
        "state_gradients_64": Launch(64, 4, 1),
        "local_gradients_256": Launch(64, 8, 1, 128),
        "local_gradients_128": Launch(64, 8, 1, 128),
        "local_gradients_64": Launch(64, 4, 1),
        "score_gradients": Launch(256, 8, 1),
        "query_key_gradients": Launch(64, 4, 3),
    },
    "other": {
        "chunk_scores": Launch(64, 4, 3),
        "recurrence_256": Launch(32, 8, 2),
        "recurrence_128": Launch(32, 4, 2),
        "recurrence_64": Launch(32, 4, 2),
        "state_gradients_256": Launch(32, 8, 1),
        "state_gradients_128": Launch(32, 8, 1),
        "state_gradients_64": Launch(32, 8, 1),
        "score_gradients": Launch(64, 8, 1),
        "query_key_gradients": Launch(32, 4, 2),
    },
    "float32": {
        "chunk_scores": Launch(32, 8, 1),
        "recurrence_256": Launch(16, 8, 1),
        "recurrence_128": Launch(16, 8, 1),
        "recurrence_64": Launch(16, 8, 1),
        "state_gradients_256": Launch(16, 8, 1),
        "state_gradients_128": Launch(16, 8, 1),
        "state_gradients_64": Launch(16, 8, 1),
        "score_gradients": Launch(32, 8, 1),
        "query_key_gradients": Launch(32, 8, 1),
    },
}
# A Hopper chip of 132 multiprocessors runs one such program on each.
FEW_PROGRAMS = 132
# The triangular solve is float32 for every type of input: one warp spills a little and is still the fastest.
SOLVE_WARPS = 1


@functools.cache
def _family(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return "float32"
    return "hopper" if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 else "other"


def launch_for(kernel: str, like: torch.Tensor) -> Launch:
    """The row of the table for inputs such as ``like``."""
    return LAUNCHES[_family(like.device, like.dtype)][kernel]


def recurrence_launch(k: torch.Tensor, value_size: int, num_segments: int) -> tuple[Launch, bool]:
    """Both recurrences hold [K, tile] of the state: the key size decides. K below 64 runs as 64 does.

    Returns also whether to use the kernels written for Hopper. Few segments get narrower tiles: more programs.
    """
    family, key_size = _family(k.device, k.dtype), k.shape[2]
    launch = LAUNCHES[family][f"recurrence_{max(64, key_size)}"]
    on_hopper = family == "hopper" and min(key_size, value_size) >= 64
    launch = launch._replace(tile=min(launch.tile, value_size))
    if on_hopper:
        while launch.tile > 32 and num_segments * k.shape[1] * (value_size // launch.tile) <= FEW_PROGRAMS:
            launch = launch._replace(tile=launch.tile // 2)
        launch = launch._replace(num_stages=2 if launch.tile <= 32 else 1)
    return launch, on_hopper


def state_gradients_launch(k: torch.Tensor, value_size: int) -> tuple[Launch, bool]:
    """The state gradients hold [tile, V] of the state: V decides. Returns also whether Hopper's kernels do it."""
    family = _family(k.device, k.dtype)
    launch = LAUNCHES[family][f"state_gradients_{max(64, value_size)}"]
    if k.shape[2] < launch.tile:
        launch = launch._replace(tile=k.shape[2], num_warps=max(4, launch.num_warps * k.shape[2] // launch.tile))
    return launch, family == "hopper" and min(k.shape[2], value_size) >= 64


def local_gradients_launch(k: torch.Tensor, value_size: int) -> tuple[Launch | None, bool]:
    """[tile] columns of dq and dk at a time. Only Hopper has the kernel that does all of a chunk: None elsewhere."""
    on_hopper = _family(k.device, k.dtype) == "hopper" and min(k.shape[2], value_size) >= 64
    return LAUNCHES["hopper"][f"local_gradients_{max(k.shape[2], value_size)}"] if on_hopper else None, on_hopper
