"""The table of chunks in one launch: a handful of small operations would cost the host more time than the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Slots a program, and segments that its loop takes at a time; not tuned.
SLOTS_TILE, SEGMENTS_TILE = 64, 128


@triton.jit(do_not_specialize=["num_segments", "num_slots"])
def _chunk_table_kernel(
    cu_seqlens,
    segment,
    index,
    offsets,
    num_segments,
    num_slots,
    CHUNK: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
):
    """segment[n] is the number of segments whose chunks end at or before slot n; the last of these ends is the slot of
    the segment's first chunk, from which index[n] counts."""
    i_block = tl.program_id(0)
    b_n = i_block * BN + tl.arange(0, BN)
    b_segment = tl.zeros([BN], tl.int32)
    b_first = tl.zeros([BN], tl.int32)
    i_end = i_block * 0
    if i_block == 0:
        tl.store(offsets, 0)
    # Every program adds up all segments' chunks, BS segments at a time; the first program stores the sums as offsets.
    for i in range(0, num_segments, BS):
        b_s = i + tl.arange(0, BS)
        m_s = b_s < num_segments
        b_rows = tl.load(cu_seqlens + b_s + 1, mask=m_s, other=0) - tl.load(cu_seqlens + b_s, mask=m_s, other=0)
        b_chunks = (b_rows + CHUNK - 1) // CHUNK
        b_ends = i_end + tl.cumsum(b_chunks, axis=0)
        if i_block == 0:
            tl.store(offsets + b_s + 1, b_ends, mask=m_s)
        b_before = m_s[None, :] & (b_ends[None, :] <= b_n[:, None])  # [BN, BS]
        b_segment += tl.sum(b_before.to(tl.int32), axis=1)
        b_first = tl.maximum(b_first, tl.max(tl.where(b_before, b_ends[None, :], 0), axis=1))
        i_end += tl.sum(b_chunks, axis=0)
    tl.store(segment + b_n, b_segment, mask=b_n < num_slots)
    tl.store(index + b_n, b_n - b_first, mask=b_n < num_slots)


def chunk_table_triton(cu_seqlens: torch.Tensor, num_slots: int, chunk_size: int) -> tuple[torch.Tensor, ...]:
    """segment [N], index [N] and offsets [S + 1] of :class:`~mom_layers.recur.chunk_table.ChunkTable`, all int32."""
    segment, index = torch.empty(2, num_slots, dtype=torch.int32, device=cu_seqlens.device).unbind()
    offsets = torch.empty_like(cu_seqlens)
    _chunk_table_kernel[(max(1, triton.cdiv(num_slots, SLOTS_TILE)),)](
        cu_seqlens=cu_seqlens,
        segment=segment,
        index=index,
        offsets=offsets,
        num_segments=cu_seqlens.shape[0] - 1,
        num_slots=num_slots,
        CHUNK=chunk_size,
        BN=SLOTS_TILE,
        BS=SEGMENTS_TILE,
        num_warps=4,
    )
    return segment, index, offsets
