"""Lays packed segments out in chunks for the PyTorch paths of the recurrences."""

from __future__ import annotations

import torch


def chunk_rows(cu_seqlens: torch.Tensor, num_rows: int, chunk: int) -> tuple[torch.Tensor, list[int], list[int]]:
    """Lays rows out in chunks, ordered by (chunk of the segment, segment from longest to shortest).

    Chunks are as long as the longest segment where that is shorter than ``chunk``. Reads lengths on the host: this
    serves the CPU and comparisons.

    Returns:
        The row of every chunk place [N, C] (``num_rows`` where there is none), the number of segments that still run
        at each step, and the segments' order.
    """
    edges = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]
    chunk = max(1, min(chunk, max(lengths)))
    counts = [-(-length // chunk) for length in lengths]
    order = sorted(range(len(lengths)), key=lambda s: -counts[s])
    running = [sum(count > step for count in counts) for step in range(max(counts))]
    start, end = [], []
    for step, active in enumerate(running):
        start += [edges[s] + step * chunk for s in order[:active]]
        end += [edges[s + 1] for s in order[:active]]
    place = torch.tensor(start, dtype=torch.long)[:, None] + torch.arange(chunk)
    place = torch.where(place < torch.tensor(end, dtype=torch.long)[:, None], place, num_rows)
    return place.to(cu_seqlens.device), running, order
