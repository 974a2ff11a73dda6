"""Packed segments laid out in chunks, and the recurrence from chunk to chunk, for the PyTorch paths of kernel families.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunks N of C rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


class ChunkRows:
    """Rows in chunks: first every segment's first chunk, then every second one, and so on; longest segments first.

    Chunks have ``chunk`` rows, or as many as the longest segment where that is shorter. Reads lengths on the host: for
    the CPU and for comparisons.

    Attributes:
        place: [N, C], the row of every place in a chunk; R where a place is empty.
        running: for each step, the number of segments that have a chunk left.
        order: the segments, longest first.
    """

    def __init__(self, cu_seqlens: torch.Tensor, num_rows: int, chunk: int, power_of_two: bool = False):
        """``num_rows`` is at least 1. ``power_of_two``: pads the chunks' length to a power of two."""
        edges = cu_seqlens.tolist()
        lengths = [b - a for a, b in zip(edges[:-1], edges[1:], strict=True)]
        chunk = max(1, min(chunk, max(lengths)))
        counts = [-(-length // chunk) for length in lengths]
        self.num_rows = num_rows
        self.order = sorted(range(len(lengths)), key=lambda s: -counts[s])
        self.running = [sum(count > step for count in counts) for step in range(max(counts))]
        start, end = [], []
        for step, active in enumerate(self.running):
            start += [edges[s] + step * chunk for s in self.order[:active]]
            end += [edges[s + 1] for s in self.order[:active]]
        place = torch.tensor(start, dtype=torch.long)[:, None] + torch.arange(chunk)
        place = torch.where(place < torch.tensor(end, dtype=torch.long)[:, None], place, num_rows)
        if power_of_two:
            place = F.pad(place, (0, (1 << (chunk - 1).bit_length()) - chunk), value=num_rows)
        self.place = place.to(cu_seqlens.device)

    def gather(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """x [R, H, *] in chunks, [N, H, C, *]; zeros where a place is empty."""
        padded = torch.cat([x.to(dtype), x.new_zeros(1, *x.shape[1:], dtype=dtype)])
        return padded.index_select(0, self.place.flatten()).unflatten(0, self.place.shape).transpose(1, 2)

    def walk(
        self, step: Callable[..., tuple[torch.Tensor, torch.Tensor]], state: torch.Tensor, *chunks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The recurrence over every segment's chunks, one step for all segments that have a chunk left.

        Args:
            step: (state [S', H, K, V], a part [S', ...] of each of ``chunks``) -> (o [S', H, C, V], the next state).
            state: [S, H, K, V], the initial states.
            chunks: tensors [N, ...], of every chunk.

        Returns:
            o [R, H, V] and the final states [S, H, K, V].
        """
        order = torch.tensor(self.order, device=state.device)
        state = state[order]
        outputs, finished = [], []
        for parts in zip(*(x.split(self.running) for x in chunks), strict=True):
            active = parts[0].shape[0]
            if active < state.shape[0]:  # the shortest segments end first, and stand last
                finished.append(state[active:])
                state = state[:active]
            o, state = step(state, *parts)
            outputs.append(o)
        o = torch.cat(outputs).transpose(1, 2).flatten(0, 1)  # [N * C, H, V]
        # From places back to rows; empty places all write the entry after the last row, which is not read.
        # Rows after the last segment (spare rows) have no place: they read place 0.
        where = torch.zeros(self.num_rows + 1, dtype=torch.long, device=o.device)
        where[self.place.flatten()] = torch.arange(self.place.numel(), device=o.device)
        return o.index_select(0, where[: self.num_rows]), torch.cat([state, *reversed(finished)])[order.argsort()]


def sums_until(g: torch.Tensor) -> torch.Tensor:
    """g [..., C, K] to the sum over the rows up to each row, that row included."""
    return g.cumsum(-2)


def sums_after(g: torch.Tensor) -> torch.Tensor:
    """g [..., C, K] to the sum over the rows after each row.

    Summed from the end. The total minus the sum up to the row would lose a small sum beside a large total.
    """
    return F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
