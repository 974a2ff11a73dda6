"""Cuts packed segments into chunks of rows, on the device: no length is read on the host."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mom_layers.common.kernel_choice import resolve_kernels

# Rows a chunk, for which the kernels are written: the height of a warpgroup's tensor-core product, and 64 x 64 scores
# cost less than a 256 x 256 state does.
CHUNK = 64


class ChunkTable(NamedTuple):
    """Which rows every chunk slot holds. Slots N = R // C + S: at least the number of chunks, and known on the host.

    Attributes:
        segment: [N] int32, the slot's segment; S where the slot is past the last chunk.
        index: [N] int32, the chunk's place in its segment: the chunk starts at row ``cu_seqlens[segment] + C * index``.
            Meaningless past the last chunk.
        offsets: [S + 1] int32, the slot of every segment's first chunk; ``offsets[S]`` is the number of chunks.
    """

    segment: torch.Tensor
    index: torch.Tensor
    offsets: torch.Tensor


def chunk_table(
    cu_seqlens: torch.Tensor, num_rows: int, chunk_size: int = CHUNK, *, kernels: str = "torch"
) -> ChunkTable:
    """Lists the chunks of every segment in order. A segment's last chunk may be partial; an empty segment has no chunk.

    Args:
        cu_seqlens: [S + 1] int32, from 0 to ``num_rows``, never decreasing.
        num_rows: R.
        chunk_size: C, rows a chunk.
        kernels: "torch", "triton" or "auto".

    Never waits for the device, so that a CUDA graph can hold the call.
    """
    num_slots = num_rows // chunk_size + cu_seqlens.shape[0] - 1
    if resolve_kernels(kernels, cu_seqlens) == "triton":
        from mom_layers.recur.chunk_table_triton import chunk_table_triton

        return ChunkTable(*chunk_table_triton(cu_seqlens, num_slots, chunk_size))
    counts = (cu_seqlens.diff() + (chunk_size - 1)) // chunk_size
    offsets = torch.zeros_like(cu_seqlens)
    torch.cumsum(counts, 0, dtype=torch.int32, out=offsets[1:])
    slots = torch.arange(num_slots, dtype=torch.int32, device=cu_seqlens.device)
    segment = torch.searchsorted(offsets[1:], slots, right=True, out_int32=True)
    return ChunkTable(segment=segment, index=slots - offsets.index_select(0, segment), offsets=offsets)
