"""Triton kernels of the routing plan: count, scan, write. No sort and no host wait.

Tokens arrive in (sequence, time) order, so a row's place is the number of rows before it: of earlier memories, of
earlier blocks of tokens, of earlier tokens in its block. Blocks never cross a sequence: sequence b owns the blocks from
``token_cu_seqlens[b] // BT + b`` on, at least as many as it needs and ``N // BT + B`` in all, which the host knows.
A segment then starts where its sequence's first block does.

Shape legend: N tokens, k memories chosen by a token, slots = k + 1 (k without the shared memory), B sequences,
G groups, buckets = G + 1 with a token mask (the last one takes the masked tokens' rows), blocks of BT tokens, BC the
buckets padded to a power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE_ELEMENTS = 2048  # tokens times padded buckets of a block; not tuned
MAX_BUCKETS = 1024
COUNTS = ["num_sequences", "num_blocks"]  # a kernel specialised on each value would compile anew


@triton.jit
def _block_of_tokens(i_block, token_cu_seqlens, num_sequences, SEARCH_STEPS: tl.constexpr, BT: tl.constexpr):
    """(sequence of this block, the sequence's first block, this block's first token, one past the sequence's last)."""
    low = 0
    high = num_sequences
    for _ in range(SEARCH_STEPS):
        middle = (low + high) // 2
        owns = tl.load(token_cu_seqlens + middle) // BT + middle <= i_block
        low = tl.where(owns, middle, low)
        high = tl.where(owns, high, middle)
    start = tl.load(token_cu_seqlens + low)
    end = tl.load(token_cu_seqlens + low + 1)
    i_first = start // BT + low
    return low, i_first, start + (i_block - i_first) * BT, end


@triton.jit
def _memory_of_slot(memory_ids, stride_n, stride_k, i_slot, b_n, m_n, TOPK: tl.constexpr, SHARED_ID: tl.constexpr):
    """[BT] memory of this slot, the shared one after the k chosen ones; -1 for tokens outside the block."""
    m_chosen = m_n & (i_slot < TOPK)
    b_id = tl.load(memory_ids + b_n.to(tl.int64) * stride_n + i_slot * stride_k, mask=m_chosen, other=SHARED_ID)  # [BT]
    return tl.where(m_n, b_id.to(tl.int32), -1)


@triton.jit
def _choices(
    memory_ids, token_mask, stride_n, stride_k, b_n, m_n,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SHARED_ID: tl.constexpr, GROUPS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """How many rows of each bucket every token has, [BT, BC]; and which tokens are masked, [BT]."""
    b_c = tl.arange(0, BC)
    b_chosen = tl.zeros([BT, BC], dtype=tl.int32)
    for i_slot in range(SLOTS):
        b_id = _memory_of_slot(memory_ids, stride_n, stride_k, i_slot, b_n, m_n, TOPK, SHARED_ID)
        b_chosen += (b_id[:, None] == b_c[None, :]).to(tl.int32)
    b_masked = tl.zeros([BT], dtype=tl.int1)
    if token_mask is not None:
        b_masked = m_n & (tl.load(token_mask + b_n, mask=m_n, other=1) == 0)  # [BT]
        b_of_masked = tl.where(b_c == GROUPS, SLOTS, 0)
        b_chosen = tl.where(b_masked[:, None], b_of_masked[None, :], b_chosen)
    return b_chosen, b_masked


@triton.jit(do_not_specialize=COUNTS)
def _count_kernel(
    memory_ids, token_cu_seqlens, token_mask, counts,
    stride_n, stride_k, num_sequences, num_blocks, SEARCH_STEPS: tl.constexpr,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SHARED_ID: tl.constexpr, GROUPS: tl.constexpr, BUCKETS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    _, _, first, end = _block_of_tokens(i_block, token_cu_seqlens, num_sequences, SEARCH_STEPS, BT)
    b_n = first + tl.arange(0, BT)
    b_chosen, _ = _choices(
        memory_ids, token_mask, stride_n, stride_k, b_n, b_n < end, TOPK, SLOTS, SHARED_ID, GROUPS, BT, BC
    )
    b_c = tl.arange(0, BC)
    tl.store(counts + b_c.to(tl.int64) * num_blocks + i_block, tl.sum(b_chosen, axis=0), mask=b_c < BUCKETS)


@triton.jit
def _rows_before(ends, b_c, i_block, num_blocks, m_c):
    """[BC] rows before block i_block of each bucket; ends is the running sum over (bucket, block)."""
    b_at = b_c.to(tl.int64) * num_blocks + i_block
    return tl.load(ends + b_at - 1, mask=m_c & (b_at > 0), other=0)  # [BC]


@triton.jit(do_not_specialize=[*COUNTS, "num_rows"])
def _write_kernel(
    memory_ids, token_cu_seqlens, token_mask, ends,
    token_of_row, row_of_choice, segment_of_row, position_of_row, cu_seqlens, memory_offsets,
    stride_n, stride_k, num_sequences, num_blocks, num_rows, SEARCH_STEPS: tl.constexpr,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, SHARED_ID: tl.constexpr, GROUPS: tl.constexpr, BUCKETS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    i_sequence, i_first, first, end = _block_of_tokens(i_block, token_cu_seqlens, num_sequences, SEARCH_STEPS, BT)
    b_n = first + tl.arange(0, BT)
    m_n = b_n < end
    b_c = tl.arange(0, BC)
    m_c = b_c < BUCKETS
    b_chosen, b_masked = _choices(
        memory_ids, token_mask, stride_n, stride_k, b_n, m_n, TOPK, SLOTS, SHARED_ID, GROUPS, BT, BC
    )
    b_before = _rows_before(ends, b_c, i_block, num_blocks, m_c)
    b_row = tl.cumsum(b_chosen, axis=0) - b_chosen + b_before[None, :]

    # The masked tokens' segment is one for all sequences; the others begin with their sequence.
    b_start = _rows_before(ends, b_c, tl.where(b_c == GROUPS, 0, i_first), num_blocks, m_c)
    if i_block == i_first:
        m_start = m_c & ((b_c < GROUPS) | (i_block == 0))
        tl.store(cu_seqlens + b_c * num_sequences + i_sequence, b_start, mask=m_start)
    if i_block == 0:
        b_end = _rows_before(ends, b_c + 1, 0, num_blocks, b_c < GROUPS)
        b_end = tl.where(b_c == GROUPS - 1, num_rows, b_end)
        tl.store(memory_offsets + b_c, b_end, mask=b_c < GROUPS)
        tl.store(cu_seqlens + GROUPS * num_sequences + BUCKETS - GROUPS, num_rows)

    for i_slot in range(SLOTS):
        b_id = _memory_of_slot(memory_ids, stride_n, stride_k, i_slot, b_n, m_n, TOPK, SHARED_ID)
        b_id = tl.where(b_masked, GROUPS, b_id)
        b_hit = b_id[:, None] == b_c[None, :]
        b_r = tl.sum(tl.where(b_hit, b_row, 0), axis=1) + tl.where(b_masked, i_slot, 0)
        b_position = b_r - tl.sum(tl.where(b_hit, b_start[None, :], 0), axis=1)
        b_segment = b_id * num_sequences + tl.where(b_masked, 0, i_sequence)
        tl.store(row_of_choice + b_n.to(tl.int64) * SLOTS + i_slot, b_r, mask=m_n)
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
    """The tensors of a :class:`~mom_layers.route.plan.RoutingPlan`, in its order, in two launches and one scan.

    row(t, m) = sum of |m'| over memories m' < m  +  number of tokens before t that chose m

    Args:
        memory_ids: [N, k] int32 or int64 in [0, M); the ids of one token differ.
        token_cu_seqlens: [B + 1] int32, first token of every sequence, then N.
        num_memories: M, without the shared memory.
        shared: append the shared memory as group M.
        token_mask: [N] bool, False for padding, or None.

    Returns:
        token_of_row [R], row_of_choice [N, slots], segment_of_row [R], position_of_row [R], cu_seqlens [S + 1] and
        memory_offsets [G], all int32.

    Raises:
        ValueError: more memories than the kernels hold, or more rows than int32 numbers.
    """
    tokens, topk = memory_ids.shape
    groups, slots = num_memories + int(shared), topk + int(shared)
    buckets = groups + int(token_mask is not None)
    rows, sequences = tokens * slots, token_cu_seqlens.shape[0] - 1
    if buckets > MAX_BUCKETS:
        raise ValueError(f"num_memories is {num_memories}; the kernels hold at most {MAX_BUCKETS - 2}")
    if rows >= 2**31:
        raise ValueError(f"{tokens} tokens in {slots} slots make {rows} rows; rows are numbered in int32")

    padded_buckets = triton.next_power_of_2(buckets)
    block = min(128, max(16, TILE_ELEMENTS // padded_buckets))
    num_blocks = tokens // block + sequences
    segments = groups * sequences + int(token_mask is not None)
    device, int32 = memory_ids.device, torch.int32
    counts = torch.empty(buckets * num_blocks, dtype=int32, device=device)
    token_of_row = torch.empty(rows, dtype=int32, device=device)
    row_of_choice = torch.empty(tokens, slots, dtype=int32, device=device)
    segment_of_row = torch.empty(rows, dtype=int32, device=device)
    position_of_row = torch.empty(rows, dtype=int32, device=device)
    cu_seqlens = torch.empty(segments + 1, dtype=int32, device=device)
    memory_offsets = torch.empty(groups, dtype=int32, device=device)

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
        SLOTS=slots,
        SHARED_ID=num_memories,
        GROUPS=groups,
        BUCKETS=buckets,
        BT=block,
        BC=padded_buckets,
    )
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
