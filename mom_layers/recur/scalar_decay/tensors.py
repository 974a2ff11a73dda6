"""Tensors that the host functions of a kernel set hand to each other.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length C, chunk slots N, span slots M, part
slots P.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mom_layers.recur.chunk_table import CHUNK, ChunkTable, chunk_table
from mom_layers.recur.chunks import SPAN

# With fewer programs than this along whole segments, long segments are cut into parts, so that about as many run: two
# for each of an H200's 132 multiprocessors, less a few.
PROGRAMS = 256


@dataclass(frozen=True)
class Inputs:
    """What both passes read, contiguous.

    Attributes:
        q, k: [R, H, K].
        v: [R, H, V], of q's type.
        g: [R, H] log of the decay, [H] where it is the same for all rows, None without decay.
        scale: of q.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor | None
    scale: float

    @property
    def decay_by_row(self) -> bool:
        return self.g is not None and self.g.dim() == 2


@dataclass(frozen=True)
class Cuts:
    """How S packed segments are cut.

    Attributes:
        cu_seqlens: [S + 1] int32, first row of every segment, then the number of rows.
        parts: the segments in parts of ``part_chunks`` chunks, a program each.
        part_chunks: a multiple of SPAN.
        in_parts: whether a segment may have several parts.
        chunks: the segments in chunks of CHUNK rows; None where no decay is by row.
    """

    cu_seqlens: torch.Tensor
    parts: ChunkTable
    part_chunks: int
    in_parts: bool
    chunks: ChunkTable | None

    @classmethod
    def of(cls, cu_seqlens: torch.Tensor, num_rows: int, programs: int, decay_by_row: bool) -> Cuts:
        """Never waits for the device.

        Args:
            programs: for every part.
            decay_by_row: whether chunks are needed.
        """
        in_parts = (cu_seqlens.shape[0] - 1) * programs < PROGRAMS
        wanted = num_rows * programs // PROGRAMS if in_parts else num_rows
        part_chunks = SPAN * max(1, -(-wanted // (SPAN * CHUNK)))
        in_parts = in_parts and num_rows > part_chunks * CHUNK
        parts = chunk_table(cu_seqlens, num_rows, part_chunks * CHUNK, kernels="triton")
        chunks = chunk_table(cu_seqlens, num_rows, CHUNK, kernels="triton") if decay_by_row else None
        return cls(cu_seqlens, parts, part_chunks, in_parts, chunks)

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_parts(self) -> int:
        """Part slots: at least the number of parts, known on the host."""
        return self.parts.segment.shape[0]

    @property
    def num_slots(self) -> int:
        """Chunk slots: at least the number of chunks, known on the host. 0 where chunks are not listed."""
        return 0 if self.chunks is None else self.chunks.segment.shape[0]

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All tensors, for ``save_for_backward``; :meth:`from_tensors` makes the object again."""
        return (self.cu_seqlens, *self.parts, *(self.chunks or ()))

    @classmethod
    def from_tensors(cls, tensors: tuple[torch.Tensor, ...], part_chunks: int, in_parts: bool) -> Cuts:
        cu_seqlens, *tables = tensors
        chunks = ChunkTable(*tables[3:]) if len(tables) > 3 else None
        return cls(cu_seqlens, ChunkTable(*tables[:3]), part_chunks, in_parts, chunks)


@dataclass(frozen=True)
class PartStates:
    """What every part adds to the state, and leaves of the state before it.

    Attributes:
        states: [P, H, K, V] float32; unset where no part follows.
        decays: [P, H] float32.
    """

    states: torch.Tensor
    decays: torch.Tensor


@dataclass(frozen=True)
class DecayTerms:
    """What the walks of dq and dk store for the gradient of a decay by row.

    Index 0 is for the rows that read the states before the chunks (q * dq), index 1 for the rows that were written to
    the states after the chunks (k * dk). Parts are the programs' columns of K.

    Attributes:
        spans: the segments in spans of SPAN chunks.
        row_terms: [2, N, H, parts, C] float32, a row's sums.
        totals: [2, N, H, parts] float32, a chunk's sums.
        span_states: [M, H, V, K] in q's type, S^T before every span.
        decayed_state: [S, H, V, K], the part of the final state that was there before the last chunk; None where the
            final state has no gradient.
        boundary: [M, H, parts * blocks] float32, <S, dS> after every span, of a part and block of the state's rows.
    """

    spans: ChunkTable
    row_terms: torch.Tensor
    totals: torch.Tensor
    span_states: torch.Tensor
    decayed_state: torch.Tensor | None
    boundary: torch.Tensor

    @classmethod
    def empty(cls, inputs: Inputs, cuts: Cuts, parts: int, blocks: int, final_state_gradient: bool) -> DecayTerms:
        q, (rows, heads, v_dim) = inputs.q, inputs.v.shape
        spans = chunk_table(cuts.cu_seqlens, rows, SPAN * CHUNK, kernels="triton")
        shape = 2, cuts.num_slots, heads, parts
        sizes = heads, v_dim, q.shape[2]
        return cls(
            spans,
            torch.empty(*shape, CHUNK, dtype=torch.float32, device=q.device),
            torch.empty(shape, dtype=torch.float32, device=q.device),
            q.new_empty(spans.segment.shape[0], *sizes),
            q.new_empty(cuts.num_segments, *sizes) if final_state_gradient else None,
            torch.empty(spans.segment.shape[0], heads, parts * blocks, dtype=torch.float32, device=q.device),
        )
