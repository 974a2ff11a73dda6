"""The card's own speeds, and the time of a call."""

from __future__ import annotations

from collections.abc import Callable

import torch

PRODUCT_SIDE = 8192  # of the square matrices whose product is timed
COPY_BYTES = 1 << 28
WARM_UP, REPEAT = 20, 80  # milliseconds


def graphed(step: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph's replay, without the host's time; the call itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
    except RuntimeError:
        torch.cuda.synchronize()
        return step
    return graph.replay


def milliseconds(step: Callable[[], object]) -> float:
    """Median time of a call on the device, each time with an empty L2 cache."""
    from triton.testing import do_bench

    return float(do_bench(graphed(step), warmup=WARM_UP, rep=REPEAT, return_mode="median"))


def card_speeds(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a large copy (each byte read and written counts), operations a second of a large product."""
    from triton.testing import do_bench

    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = do_bench(lambda: target.copy_(source), warmup=WARM_UP, rep=REPEAT, return_mode="median")
    a = torch.randn(PRODUCT_SIDE, PRODUCT_SIDE, device="cuda", dtype=dtype)
    product = do_bench(lambda: a @ a, warmup=WARM_UP, rep=REPEAT, return_mode="median")
    return 2e3 * COPY_BYTES / copy, 2e3 * PRODUCT_SIDE**3 / product


def floor_milliseconds(moved: float, flops: float, speeds: tuple[float, float]) -> float:
    """The least time that the card needs for the bytes or for the operations, whichever takes longer."""
    return 1e3 * max(moved / speeds[0], flops / speeds[1])
