"""A recomputed region of a model keeps what the first forward pass says, and the second forward pass reads that.

With --recompute-granularity full Megatron runs a region's forward pass twice: without gradients, and again in the
backward pass. What costs time and little memory, and is the same both times, can be kept in between: `kept_value`.
"""

import threading
from collections.abc import Callable
from contextlib import contextmanager

from megatron_patches.patch import Patch, wrap


class _Region:
    """The values of one region, in the order in which its forward pass asks for them."""

    def __init__(self):
        self.values: list = []
        self.next: int | None = None  # of the second forward pass; None in the first


_here = threading.local()  # a backward pass runs in threads of its own


@contextmanager
def _inside(region: _Region):
    before = getattr(_here, "region", None)
    _here.region = region
    try:
        yield
    finally:
        _here.region = before


def kept_value[T](compute: Callable[[], T]) -> T:
    """``compute()``; in the second forward pass of a recomputed region what the first forward pass computed.

    The two passes must call this function equally often and in the same order.
    """
    region: _Region | None = getattr(_here, "region", None)
    if region is None:
        return compute()
    if region.next is None:
        region.values.append(compute())
        return region.values[-1]
    region.next += 1
    return region.values[region.next - 1]


def _first_pass(forward, ctx, *args):
    ctx.kept_values = _Region()
    with _inside(ctx.kept_values):
        return forward(ctx, *args)


def _second_pass(backward, ctx, *gradients):
    ctx.kept_values.next = 0
    with _inside(ctx.kept_values):
        return backward(ctx, *gradients)


PATCH = Patch(
    name="recomputed-regions",
    reason="a recomputed region cannot keep what its first forward pass computed, such as states of other ranks",
    removed_when="tensor_parallel.checkpoint lets the region keep values for its second forward pass",
    targets=(
        wrap("megatron.core.tensor_parallel.random", "CheckpointFunction.forward", _first_pass),
        wrap("megatron.core.tensor_parallel.random", "CheckpointFunction.backward", _second_pass),
    ),
)
