"""The routing plan: one row for every (token, memory) pair, sorted by (memory, sequence, time).

Shape legend: N tokens of the whole batch in sequence-major order (a packed batch, or [B, T] flattened); B sequences or
packed documents; M routed memories; A = M + 1 all memories, the shared memory last (A = M without it); k routed
memories that a token goes to; k + 1 choices of a token, the shared memory last (k without it); R = N (k + 1) rows;
S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from mom_layers.common.checks import (
    TRUTH,
    WHOLE,
    check_borders,
    check_range,
    check_tensors,
    check_truth,
    check_whole,
    checks_values,
)
from mom_layers.common.kernel_choice import resolve_kernels
from mom_layers.common.supported import MAX_MEMORIES


@dataclass(frozen=True)
class RoutingPlan:
    """Rows in segments: segment ``m * B + b`` holds the tokens of sequence b that memory m receives, in time order.

    With a token mask the last segment holds the rows of the masked tokens. Every operation computes these rows as it
    does all others, so that no row is left unwritten, and the segment's state is dropped.

    A plan whose number of rows is known on the device alone has more rows than it uses (``has_spare_rows``): the spare
    rows come last, in a segment of their own, and belong to no memory. No operation that sums over rows counts spare
    rows, and a choice whose row is on another rank has row -1.
    """

    token_of_row: torch.Tensor  # [R] int32
    row_of_choice: torch.Tensor  # [N, k + 1] int32, rows of a token's choices; -1 for a row that is not here
    segment_of_row: torch.Tensor  # [R] int32
    position_of_row: torch.Tensor  # [R] int32, a row's index inside its segment
    cu_seqlens: torch.Tensor  # [S + 1] int32, the first row of every segment, then R
    memory_offsets: torch.Tensor  # [A] int32, one past a memory's last row; the last memory ends at R
    num_sequences: int  # B
    num_all_memories: int  # A
    has_masked_segment: bool
    has_spare_rows: bool = False
    rows_are_tokens: bool = False  # row r is token r, so that nothing needs to be gathered

    @property
    def num_rows(self) -> int:
        """R."""
        return self.token_of_row.shape[0]

    @property
    def num_segments(self) -> int:
        """S = A B, and one more with a token mask or spare rows."""
        return self.cu_seqlens.shape[0] - 1

    def tensors(self) -> list[torch.Tensor]:
        """All tensors of the plan."""
        return [value for field in fields(self) if isinstance(value := getattr(self, field.name), torch.Tensor)]

    @property
    def num_rows_in_use(self) -> torch.Tensor:
        """[1] int32 on the device: the rows before the spare rows."""
        return self.memory_offsets[-1:]

    def time_major(self) -> RoutingPlan:
        """The same rows for tokens that are stored time first, so that a layer reads [T, B, D] without transposing it.

        The sequences have one length T. Token b T + t of this plan is token t B + b of the new one.
        """
        shape = (self.num_sequences, -1)
        tokens = torch.arange(self.row_of_choice.shape[0], dtype=torch.int32, device=self.token_of_row.device)
        place = tokens.unflatten(0, shape[::-1]).t().flatten()
        return replace(
            self,
            token_of_row=place.index_select(0, self.token_of_row),
            row_of_choice=self.row_of_choice.unflatten(0, shape).transpose(0, 1).flatten(0, 1),
        )

    def to_segments(self, state: torch.Tensor) -> torch.Tensor:
        """State [B, A, ...] of sequences to [S, ...] of segments; zeros for masked tokens and spare rows."""
        segments = state.transpose(0, 1).flatten(0, 1)
        if self.num_segments > segments.shape[0]:
            # Masked tokens start from an empty state, which from_segments drops again.
            segments = torch.cat([segments, segments.new_zeros(1, *segments.shape[1:])])
        return segments

    def from_segments(self, segments: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_segments`."""
        # The masked tokens' segment is the last one.
        unmasked = segments[: self.num_all_memories * self.num_sequences]
        return unmasked.unflatten(0, (self.num_all_memories, self.num_sequences)).transpose(0, 1)


def _plan_torch(memory_ids, token_cu_seqlens, num_memories, shared, token_mask):
    tokens, topk = memory_ids.shape
    device = memory_ids.device
    all_memories, choices = num_memories + int(shared), topk + int(shared)
    rows = tokens * choices

    # One bucket of rows for each memory, and one for the rows of masked tokens.
    ids = memory_ids.long()
    if shared:
        ids = torch.cat([ids, ids.new_full((tokens, 1), num_memories)], dim=1)
    buckets = all_memories
    if token_mask is not None:
        ids = torch.where(token_mask[:, None], ids, all_memories)
        buckets += 1

    # Tokens are in (sequence, time) order, so that the running number of tokens of a bucket is the stable sort.
    chosen = torch.zeros(tokens, buckets, dtype=torch.int32, device=device)
    chosen.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int32))
    after = chosen.cumsum(0, dtype=torch.int32)
    total = chosen.sum(0, dtype=torch.int32)
    end = total.cumsum(0, dtype=torch.int32)
    start = end - total

    # row(t, m) = first row of memory m + number of tokens before t that chose m.
    row_of_choice = (start + after - chosen).gather(1, ids)
    if token_mask is not None:  # a masked token has k + 1 rows of the last bucket
        row_of_choice += torch.where(ids == all_memories, torch.arange(choices, dtype=torch.int32, device=device), 0)
    token_of_row = torch.empty(rows, dtype=torch.int32, device=device)
    token = torch.arange(tokens, dtype=torch.int32, device=device)[:, None].expand(tokens, choices)
    token_of_row.scatter_(0, row_of_choice.flatten().long(), token.flatten())

    # A segment starts after the rows that its memory has of earlier sequences.
    # before[b] = rows that each bucket has of the sequences before b
    before = torch.cat([after.new_zeros(1, buckets), after])[token_cu_seqlens[:-1].long()]  # [B, buckets]
    starts = (start + before)[:, :all_memories].t().flatten()
    edges = [starts, end[-1:]] if token_mask is None else [starts, start[-1:], end[-1:]]
    cu_seqlens = torch.cat(edges)
    # The last memory's rows end at R, so that a grouped product over the memories covers the masked rows too.
    memory_offsets = end[:all_memories].clone()
    memory_offsets[-1:] = end[-1:]

    # Rows are sorted by segment, so that a binary search finds the segment of each.
    row = torch.arange(rows, dtype=torch.int32, device=device)
    segment_of_row = torch.searchsorted(cu_seqlens, row, right=True, out_int32=True) - 1
    position_of_row = row - cu_seqlens[segment_of_row]
    return token_of_row, row_of_choice, segment_of_row, position_of_row, cu_seqlens, memory_offsets


def _check(memory_ids, token_cu_seqlens, num_memories, shared, token_mask, kernels) -> None:
    check_tensors(WHOLE, memory_ids=memory_ids)
    check_tensors(WHOLE, memory_ids.device, token_cu_seqlens=token_cu_seqlens)
    if token_mask is not None:
        check_tensors(TRUTH, memory_ids.device, token_mask=token_mask)
    check_whole(1, num_memories=num_memories)
    check_truth(shared=shared)
    if memory_ids.dim() != 2 or memory_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"memory_ids must be int32 or int64 [N, k], got {memory_ids.dtype} {list(memory_ids.shape)}")
    tokens, topk = memory_ids.shape
    if not 1 <= topk <= num_memories:
        raise ValueError(f"memory_ids must be [N, k] with k from 1 to num_memories ({num_memories}), got k = {topk}")
    if token_cu_seqlens.dim() != 1 or token_cu_seqlens.numel() < 2 or token_cu_seqlens.dtype != torch.int32:
        raise ValueError(
            "token_cu_seqlens must be int32 [B + 1] with B >= 1, "
            f"got {token_cu_seqlens.dtype} {list(token_cu_seqlens.shape)}"
        )
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != memory_ids.shape[:1]):
        raise ValueError(f"token_mask must be bool [{tokens}], got {token_mask.dtype} {list(token_mask.shape)}")
    # A larger number would wrap around and name wrong rows.
    rows = tokens * (topk + int(shared))
    if rows >= 2**31:
        raise ValueError(f"rows are numbered in int32: {tokens} tokens must have fewer than 2^31 rows, got {rows}")
    if kernels == "triton" and num_memories + int(shared) + int(token_mask is not None) > MAX_MEMORIES:
        raise ValueError(f"num_memories must be at most {MAX_MEMORIES - 2} for kernels='triton', got {num_memories}")
    # Values last: only a plan that fits is worth reading.
    check_range(0, num_memories, memory_ids=memory_ids)
    if checks_values(memory_ids) and (memory_ids.sort(1).values.diff(dim=1) == 0).any():
        raise ValueError("memory_ids must name different memories for one token, got one memory twice")
    check_borders(token_cu_seqlens, tokens, "token_cu_seqlens")


def build_routing_plan(
    memory_ids: torch.Tensor,
    token_cu_seqlens: torch.Tensor,
    *,
    num_memories: int,
    shared: bool = True,
    token_mask: torch.Tensor | None = None,
    kernels: str = "auto",
) -> RoutingPlan:
    """Sorts (token, memory) pairs into rows by (memory, sequence, time). The host reads no data.

    ``row(t, m) = number of rows of memories before m + number of tokens before t that chose m``

    Args:
        memory_ids: [N, k] int32 or int64 in [0, M); the ids of one token differ.
        token_cu_seqlens: [B + 1] int32 on the same device, the first token of every sequence, then N. Sequences may be
            empty.
        num_memories: M, without the shared memory.
        shared: append the shared memory as memory M, to which every token goes.
        token_mask: [N] bool, False for padding: such tokens go to no memory.
        kernels: "auto", "torch" or "triton", which takes M up to 1022.

    Returns:
        the plan, with all its tensors on the device of ``memory_ids``.

    Raises:
        ValueError: a shape or type that does not fit, more memories than the kernels take, or 2^31 rows.
    """
    kernels = resolve_kernels(kernels, memory_ids)
    _check(memory_ids, token_cu_seqlens, num_memories, shared, token_mask, kernels)
    if kernels == "triton":
        from mom_layers.route.plan_triton import plan_triton as plan
    else:
        plan = _plan_torch
    tensors = plan(memory_ids, token_cu_seqlens, num_memories, shared, token_mask)
    return RoutingPlan(
        *tensors,
        num_sequences=token_cu_seqlens.shape[0] - 1,
        num_all_memories=num_memories + int(shared),
        has_masked_segment=token_mask is not None,
    )
