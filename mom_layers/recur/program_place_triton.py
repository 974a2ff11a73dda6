"""What a program of a chunked recurrence's kernel works on, for every kernel family: its segment, span or chunk.

Three kinds of kernels cut the work in three ways:

    along a segment   one program walks a tile of the state through all chunks of one segment and head
    along a span      one program walks a tile of the state through the chunks of one span and head
    in a chunk        one program computes a chunk of one head, or a tile of it

Program numbers count tiles first, then heads, then segments, spans or chunks: programs that read the same rows run at
the same time. The tables are those of :class:`~mom_layers.recur.chunks.Chunks`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def segment_of_program(cu_seqlens, H: tl.constexpr, TILES: tl.constexpr):
    """Tile, head, segment, the segment's first row and its number of rows, of a program along a segment.

    The last segments start first: in a Mixture-of-Memories they are the shared memory's, the longest ones.
    """
    i_tile = tl.program_id(0) % TILES
    i_h = tl.program_id(0) // TILES % H
    i_s = (tl.num_programs(0) - 1 - tl.program_id(0)) // TILES // H
    i_first = tl.load(cu_seqlens + i_s)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    return i_tile, i_h, i_s, i_first, num_rows


@triton.jit
def span_of_program(span_segment, H: tl.constexpr, TILES: tl.constexpr):
    """Tile, head, span slot and the span's segment, of a program along a span.

    The segment is the number of segments where the slot is past the last span: the program must return.
    """
    i_tile = tl.program_id(0) % TILES
    i_h = tl.program_id(0) // TILES % H
    i_span = tl.program_id(0) // TILES // H
    i_s = tl.load(span_segment + i_span)
    return i_tile, i_h, i_span, i_s


@triton.jit
def rows_of_span(cu_seqlens, chunk_offsets, span_index, i_span, i_s, BT: tl.constexpr, SPAN: tl.constexpr):
    """A span's first row, the rows from there to the segment's end, the span's chunks, and its first chunk's slot."""
    i_first_chunk = tl.load(span_index + i_span) * SPAN
    i_first = tl.load(cu_seqlens + i_s) + i_first_chunk * BT
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = tl.minimum(tl.cdiv(num_rows, BT), SPAN)
    i_slot = tl.load(chunk_offsets + i_s) + i_first_chunk
    return i_first, num_rows, num_chunks, i_slot


@triton.jit
def chunk_of_program(chunk_segment, H: tl.constexpr):
    """Chunk slot, head and the chunk's segment, of a program in a chunk that takes all of it.

    The segment is the number of segments where the slot is past the last chunk: the program must return.
    """
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_s = tl.load(chunk_segment + i_c)
    return i_c, i_h, i_s


@triton.jit
def tile_of_chunk(chunk_segment, H: tl.constexpr, TILES: tl.constexpr):
    """Tile, head, chunk slot and the chunk's segment, of a program in a chunk that takes one of its tiles.

    The segment is the number of segments where the slot is past the last chunk: the program must return.
    """
    return span_of_program(chunk_segment, H, TILES)


@triton.jit
def part_of_program(part_segment, H: tl.constexpr, TILES: tl.constexpr):
    """Tile, head, part slot and the part's segment, of a program along a part of a segment.

    The last segments start first, as in `segment_of_program`. The segment is the number of segments where the slot is
    past the last part: the program must return.
    """
    i_tile = tl.program_id(0) % TILES
    i_h = tl.program_id(0) // TILES % H
    i_part = (tl.num_programs(0) - 1 - tl.program_id(0)) // TILES // H
    i_s = tl.load(part_segment + i_part)
    return i_tile, i_h, i_part, i_s
