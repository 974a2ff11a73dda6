"""Packed segments cut into chunks of rows, and chunks joined into spans: what every chunked recurrence walks over."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mom_layers.recur.chunk_table import CHUNK, ChunkTable, chunk_table

# Chunks a span: the forward pass stores one state a span for the backward pass, which computes the others again. At
# 49152 rows of 4 heads of 256 the spans' states take 106 MB; those of all chunks would take 848. Not tuned for speed.
SPAN = 8


@dataclass(frozen=True)
class Chunks:
    """The chunks and spans of S packed segments.

    Attributes:
        cu_seqlens: [S + 1] int32, first row of every segment, then the number of rows.
        table: the segments in chunks of CHUNK rows.
        spans: the segments in spans of SPAN chunks, or of another number that a family chooses.
    """

    cu_seqlens: torch.Tensor
    table: ChunkTable
    spans: ChunkTable

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, num_rows: int, span: int = SPAN) -> Chunks:
        """Cuts segments of ``num_rows`` rows in all; ``span`` chunks a span. Never waits for the device."""
        return cls(
            cu_seqlens,
            chunk_table(cu_seqlens, num_rows, CHUNK, kernels="triton"),
            chunk_table(cu_seqlens, num_rows, span * CHUNK, kernels="triton"),
        )

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_slots(self) -> int:
        """Chunk slots: at least the number of chunks, known on the host."""
        return self.table.segment.shape[0]

    @property
    def num_span_slots(self) -> int:
        """Span slots: at least the number of spans, known on the host."""
        return self.spans.segment.shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, for ``save_for_backward``; :meth:`from_tensors` makes the object again."""
        return (self.cu_seqlens, *self.table, *self.spans)

    @classmethod
    def from_tensors(cls, tensors: tuple[torch.Tensor, ...]) -> Chunks:
        cu_seqlens, *tables = tensors
        return cls(cu_seqlens, ChunkTable(*tables[:3]), ChunkTable(*tables[3:]))
