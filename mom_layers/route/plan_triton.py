"""Triton kernels of the routing plan: count, running sum, write. No sort and no host wait.

Tokens are in (sequence, time) order, so that a row's number is the number of rows before it: of earlier memories, of
earlier blocks of tokens, of earlier tokens in its block. No block crosses a sequence: sequence b has the blocks from
``token_cu_seqlens[b] // BT + b`` on, at least as many as its tokens fill, and the ``N // BT + B`` blocks of all
sequences are a number that the host computes. A segment starts with the first block of its sequence.

Shape legend: N tokens, k routed memories that a token goes to, CHOICES = k + 1 (k without the shared memory), B
sequences, A all memories, BUCKETS = A, or A + 1 with a token mask, whose last bucket holds the masked tokens' rows.
Tiles are BT tokens by BC buckets, padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 2048  # of a [BT, BC] tile; not tuned
COUNTS = ["num_sequences", "num_blocks"]  # Triton would compile the kernels again for some values of these numbers


@triton.jit
def _block_of_tokens(i_block, token_cu_seqlens, num_sequences, SEARCH_STEPS: tl.constexpr, BT: tl.constexpr):
    """(sequence of the block, the sequence's first block, the block's first token, one past the sequence's last)."""
    # Binary search for the last sequence whose first block is not after this block.
    low = 0
    high = num_sequences
    for _ in range(SEARCH_STEPS):
        middle = (low + high) // 2
        owns = tl.load(token_cu_seqlens + middle) // BT + middle <= i_block
        # Every step halves the range; after SEARCH_STEPS of them one sequence is left.
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle)
    start = tl.load(token_cu_seqlens + low)
    end = tl.load(token_cu_seqlens + low + 1)
    i_first = start // BT + low
    return low, i_first, start + (i_block - i_first) * BT, end


@triton.jit
def _memory_of_choice(memory_ids, stride_n, stride_k, i_choice, b_n, m_n, TOPK: tl.constexpr, SHARED_ID: tl.constexpr):
    """[BT] memory of choice i_choice, the shared memory after the k routed memories; -1 outside the block's tokens."""
    m_routed = m_n & (i_choice < TOPK)
    p_id = memory_ids + b_n.to(tl.int64) * stride_n + i_choice * stride_k
    b_id = tl.load(p_id, mask=m_routed, other=SHARED_ID)  # [BT]
    return tl.where(m_n, b_id.to(tl.int32), -1)


@triton.jit
def _rows_of_buckets(
    memory_ids, token_mask, stride_n, stride_k, b_n, m_n,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, SHARED_ID: tl.constexpr, A: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """How many rows every token has in each bucket, [BT, BC]; and which tokens are masked, [BT]."""
    b_c = tl.arange(0, BC)
    # One comparison of all buckets for each choice: a histogram without atomics.
    b_chosen = tl.zeros([BT, BC], dtype=tl.int32)
    for i_choice in range(CHOICES):
        b_id = _memory_of_choice(memory_ids, stride_n, stride_k, i_choice, b_n, m_n, TOPK, SHARED_ID)
        b_chosen += (b_id[:, None] == b_c[None, :]).to(tl.int32)
    b_masked = tl.zeros([BT], dtype=tl.int1)
    if token_mask is not None:
        # All k + 1 rows of a masked token are in the last bucket.
        b_masked = m_n & (tl.load(token_mask + b_n, mask=m_n, other=1) == 0)  # [BT]
        b_of_masked = tl.where(b_c == A, CHOICES, 0)
        b_chosen = tl.where(b_masked[:, None], b_of_masked[None, :], b_chosen)
    return b_chosen, b_masked


@triton.jit(do_not_specialize=COUNTS)
def _count_kernel(
    memory_ids, token_cu_seqlens, token_mask, counts,
    stride_n, stride_k, num_sequences, num_blocks, SEARCH_STEPS: tl.constexpr,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, SHARED_ID: tl.constexpr, A: tl.constexpr, BUCKETS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """counts[bucket, block] = number of rows that the block's tokens have in the bucket."""
    i_block = tl.program_id(0)
    _, _, first, end = _block_of_tokens(i_block, token_cu_seqlens, num_sequences, SEARCH_STEPS, BT)
    b_n = first + tl.arange(0, BT)
    b_chosen, _ = _rows_of_buckets(
        memory_ids, token_mask, stride_n, stride_k, b_n, b_n < end, TOPK, CHOICES, SHARED_ID, A, BT, BC
    )
    # Bucket-major, so that the running sum over all counts is in the order of the rows.
    b_c = tl.arange(0, BC)
    tl.store(counts + b_c.to(tl.int64) * num_blocks + i_block, tl.sum(b_chosen, axis=0), mask=b_c < BUCKETS)


@triton.jit
def _rows_before(ends, b_c, i_block, num_blocks, m_c):
    """[BC] number of rows of earlier buckets, and of the bucket's blocks before i_block; ends: the counts' sums."""
    b_at = b_c.to(tl.int64) * num_blocks + i_block
    return tl.load(ends + b_at - 1, mask=m_c & (b_at > 0), other=0)  # [BC]


@triton.jit(do_not_specialize=[*COUNTS, "num_rows"])
def _write_kernel(
    memory_ids, token_cu_seqlens, token_mask, ends,
    token_of_row, row_of_choice, segment_of_row, position_of_row, cu_seqlens, memory_offsets,
    stride_n, stride_k, num_sequences, num_blocks, num_rows, SEARCH_STEPS: tl.constexpr,
    TOPK: tl.constexpr, CHOICES: tl.constexpr, SHARED_ID: tl.constexpr, A: tl.constexpr, BUCKETS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Writes the plan's tensors for the block's tokens.

    row(t, bucket) = rows of earlier buckets + the bucket's rows of earlier blocks, and of earlier tokens of this block
    """
    i_block = tl.program_id(0)
    i_sequence, i_first, first, end = _block_of_tokens(i_block, token_cu_seqlens, num_sequences, SEARCH_STEPS, BT)
    b_n = first + tl.arange(0, BT)
    m_n = b_n < end
    b_c = tl.arange(0, BC)
    m_c = b_c < BUCKETS
    b_chosen, b_masked = _rows_of_buckets(
        memory_ids, token_mask, stride_n, stride_k, b_n, m_n, TOPK, CHOICES, SHARED_ID, A, BT, BC
    )
    # row(t, bucket) for every token of the block and every bucket.
    b_before = _rows_before(ends, b_c, i_block, num_blocks, m_c)
    b_row = tl.cumsum(b_chosen, axis=0) - b_chosen + b_before[None, :]

    # First rows of the segments: of the memories' at the sequence's first block, of the masked tokens' at block 0,
    # because all sequences share that segment.
    b_start = _rows_before(ends, b_c, tl.where(b_c == A, 0, i_first), num_blocks, m_c)
    if i_block == i_first:
        m_start = b_c < tl.where(i_block == 0, BUCKETS, A)
        tl.store(cu_seqlens + b_c * num_sequences + i_sequence, b_start, mask=m_start)
    # One past a memory's last row is the next memory's first row; masked rows count to the last memory.
    if i_block == 0:
        b_end = _rows_before(ends, b_c + 1, 0, num_blocks, b_c < A)
        b_end = tl.where(b_c == A - 1, num_rows, b_end)
        tl.store(memory_offsets + b_c, b_end, mask=b_c < A)
        tl.store(cu_seqlens + A * num_sequences + BUCKETS - A, num_rows)

    # Both directions between choices and rows, and every row's place in its segment.
    for i_choice in range(CHOICES):
        b_id = _memory_of_choice(memory_ids, stride_n, stride_k, i_choice, b_n, m_n, TOPK, SHARED_ID)
        b_id = tl.where(b_masked, A, b_id)
        # The token's row and its segment's first row, picked from the bucket's column.
        b_hit = b_id[:, None] == b_c[None, :]
        b_r = tl.sum(tl.where(b_hit, b_row, 0), axis=1) + tl.where(b_masked, i_choice, 0)
        b_position = b_r - tl.sum(tl.where(b_hit, b_start[None, :], 0), axis=1)
        # Segment m B + b; all masked tokens have segment A B.
        b_segment = b_id * num_sequences + tl.where(b_masked, 0, i_sequence)
        tl.store(row_of_choice + b_n.to(tl.int64) * CHOICES + i_choice, b_r, mask=m_n)
        tl.store(token_of_row + b_r, b_n, mask=m_n)
        tl.store(segment_of_row + b_r, b_segment, mask=m_n)
        tl.store(position_of_row + b_r, b_position, mask=m_n)


def plan_triton(
    memory_ids: torch.Tensor,
    token_cu_seqlens: torch.Tensor,
    num_memories: int,
    shared: bool,
    token_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """The tensors of a :class:`~mom_layers.route.plan.RoutingPlan`, in the order of its fields, in two launches and one
    running sum; arguments as of :func:`~mom_layers.route.plan.build_routing_plan`.
    """
    tokens, topk = memory_ids.shape
    all_memories, choices = num_memories + int(shared), topk + int(shared)
    buckets = all_memories + int(token_mask is not None)
    rows, sequences = tokens * choices, token_cu_seqlens.shape[0] - 1
    # A block has at most 128 tokens, and fewer where there are many buckets, but at least 16.
    padded_buckets = triton.next_power_of_2(buckets)
    block = min(128, max(16, TILE_ELEMENTS // padded_buckets))
    # The bound that the module's text explains: no data is read for the grid.
    num_blocks = tokens // block + sequences
    segments = all_memories * sequences + int(token_mask is not None)
    device, int32 = memory_ids.device, torch.int32
    counts = torch.empty(buckets * num_blocks, dtype=int32, device=device)
    token_of_row = torch.empty(rows, dtype=int32, device=device)
    row_of_choice = torch.empty(tokens, choices, dtype=int32, device=device)
    segment_of_row = torch.empty(rows, dtype=int32, device=device)
    position_of_row = torch.empty(rows, dtype=int32, device=device)
    cu_seqlens = torch.empty(segments + 1, dtype=int32, device=device)
    memory_offsets = torch.empty(all_memories, dtype=int32, device=device)

    inputs = dict(
        memory_ids=memory_ids,
        token_cu_seqlens=token_cu_seqlens.contiguous(),
        token_mask=None if token_mask is None else token_mask.contiguous().view(torch.uint8),
        stride_n=memory_ids.stride(0),
        stride_k=memory_ids.stride(1),
        num_sequences=sequences,
        num_blocks=num_blocks,
        SEARCH_STEPS=(sequences - 1).bit_length(),
        TOPK=topk,
        CHOICES=choices,
        SHARED_ID=num_memories,
        A=all_memories,
        BUCKETS=buckets,
        BT=block,
        BC=padded_buckets,
    )
    # Count, running sum, write.
    _count_kernel[(num_blocks,)](counts=counts, **inputs)
    ends = counts.cumsum(0, dtype=int32)
    _write_kernel[(num_blocks,)](
        ends=ends,
        token_of_row=token_of_row,
        row_of_choice=row_of_choice,
        segment_of_row=segment_of_row,
        position_of_row=position_of_row,
        cu_seqlens=cu_seqlens,
        memory_offsets=memory_offsets,
        num_rows=rows,
        **inputs,
    )
    return token_of_row, row_of_choice, segment_of_row, position_of_row, cu_seqlens, memory_offsets
