"""Where every (token, memory) row lies: one list of rows sorted by (memory, sequence, time).

Shape legend: N tokens of the whole batch in sequence-major order (a packed batch, or [B, T] flattened); B sequences or
packed documents; M memories; G = M + 1 groups with the shared memory as the last one (G = M without it); k memories
chosen by a token; slots = k + 1 (k without the shared memory); R = N * slots rows; S segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mom_layers.common.kernels import resolve_kernels


@dataclass(frozen=True)
class RoutingPlan:
    """Rows grouped into segments: segment ``g * B + b`` is what memory g receives of sequence b, in time order.

    With a token mask there is one more segment at the very end: the rows of masked tokens. It is processed like any
    other, so that nothing is left unwritten, and its state is dropped.
    """

    token_of_row: torch.Tensor  # [R] int32
    row_of_choice: torch.Tensor  # [N, slots] int32; the last slot is the shared memory's where there is one
    segment_of_row: torch.Tensor  # [R] int32
    position_of_row: torch.Tensor  # [R] int32, row's index inside its segment
    cu_seqlens: torch.Tensor  # [S + 1] int32, first row of every segment, then R
    memory_offsets: torch.Tensor  # [G] int32, one past the last row of every group (masked rows count to the last)
    num_sequences: int
    num_groups: int
    has_masked_segment: bool

    @property
    def num_rows(self) -> int:
        return self.token_of_row.shape[0]

    @property
    def num_segments(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    def time_major(self) -> RoutingPlan:
        """The same rows for tokens that are stored time first: token t B + b where sequences of one length T had it as
        b T + t. Lets a layer work on [T, B, D] without transposing it.
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
        """Per-sequence state [B, G, ...] in segment order [S, ...]; zeros for the masked tokens' segment."""
        segments = state.transpose(0, 1).flatten(0, 1)
        if self.has_masked_segment:
            segments = torch.cat([segments, segments.new_zeros(1, *segments.shape[1:])])
        return segments

    def from_segments(self, segments: torch.Tensor) -> torch.Tensor:
        """The inverse of :meth:`to_segments`."""
        real = segments[: self.num_groups * self.num_sequences]
        return real.unflatten(0, (self.num_groups, self.num_sequences)).transpose(0, 1)


def _plan_torch(memory_ids, token_cu_seqlens, num_memories, shared, token_mask):
    tokens, topk = memory_ids.shape
    device = memory_ids.device
    groups = num_memories + int(shared)
    slots = topk + int(shared)
    rows = tokens * slots

    ids = memory_ids.long()
    if shared:
        ids = torch.cat([ids, ids.new_full((tokens, 1), num_memories)], dim=1)
    buckets = groups
    if token_mask is not None:
        ids = torch.where(token_mask[:, None], ids, groups)
        buckets += 1

    # Tokens come in (sequence, time) order, so counting tokens per memory is already the stable sort.
    chosen = torch.zeros(tokens, buckets, dtype=torch.int32, device=device)
    chosen.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.int32))
    after = chosen.cumsum(0, dtype=torch.int32)
    total = chosen.sum(0, dtype=torch.int32)
    end = total.cumsum(0, dtype=torch.int32)
    start = end - total

    row_of_choice = (start + after - chosen).gather(1, ids)
    if token_mask is not None:  # a masked token holds several rows of the last bucket
        row_of_choice += torch.where(ids == groups, torch.arange(slots, dtype=torch.int32, device=device), 0)
    token_of_row = torch.empty(rows, dtype=torch.int32, device=device)
    token = torch.arange(tokens, dtype=torch.int32, device=device)[:, None].expand(tokens, slots)
    token_of_row.scatter_(0, row_of_choice.flatten().long(), token.flatten())

    before = torch.cat([after.new_zeros(1, buckets), after])[token_cu_seqlens[:-1].long()]  # [B, buckets]
    starts = (start + before)[:, :groups].t().flatten()
    edges = [starts, end[-1:]] if token_mask is None else [starts, start[-1:], end[-1:]]
    cu_seqlens = torch.cat(edges)
    memory_offsets = end[:groups].clone()
    memory_offsets[-1:] = end[-1:]

    row = torch.arange(rows, dtype=torch.int32, device=device)
    segment_of_row = torch.searchsorted(cu_seqlens, row, right=True, out_int32=True) - 1
    position_of_row = row - cu_seqlens[segment_of_row]
    return token_of_row, row_of_choice, segment_of_row, position_of_row, cu_seqlens, memory_offsets


def build_routing_plan(
    memory_ids: torch.Tensor,
    token_cu_seqlens: torch.Tensor,
    *,
    num_memories: int,
    shared: bool = True,
    token_mask: torch.Tensor | None = None,
    kernels: str = "auto",
) -> RoutingPlan:
    """Sorts (token, memory) pairs into rows by (memory, sequence, time), without looking at the data on the host.

    Args:
        memory_ids: [N, k] integers in [0, M); the ids of one token differ.
        token_cu_seqlens: [B + 1] int32 on the same device; first token of every sequence, then N. Sequences may be
            empty.
        num_memories: M, without the shared memory.
        shared: append the shared memory as group M, which every token chooses.
        token_mask: [N] bool, False for padding: such tokens reach no memory.
        kernels: "auto", "torch" or "triton".

    Raises:
        ValueError: a shape or type that does not fit.
    """
    if memory_ids.dim() != 2 or memory_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"memory_ids must be int32 or int64 [N, k], got {memory_ids.dtype} {list(memory_ids.shape)}")
    if not 1 <= memory_ids.shape[1] <= num_memories:
        raise ValueError(f"memory_ids names {memory_ids.shape[1]} memories a token, of {num_memories}")
    if token_cu_seqlens.dim() != 1 or token_cu_seqlens.numel() < 2 or token_cu_seqlens.dtype != torch.int32:
        raise ValueError(
            "token_cu_seqlens must be int32 [B + 1] with B >= 1, "
            f"got {token_cu_seqlens.dtype} {list(token_cu_seqlens.shape)}"
        )
    if token_mask is not None and (token_mask.dtype != torch.bool or token_mask.shape != memory_ids.shape[:1]):
        raise ValueError(
            f"token_mask must be bool [{memory_ids.shape[0]}], got {token_mask.dtype} {list(token_mask.shape)}"
        )
    if resolve_kernels(kernels, memory_ids) == "triton":
        from mom_layers.route.plan_triton import plan_triton as plan
    else:
        plan = _plan_torch
    tensors = plan(memory_ids, token_cu_seqlens, num_memories, shared, token_mask)
    return RoutingPlan(
        *tensors,
        num_sequences=token_cu_seqlens.shape[0] - 1,
        num_groups=num_memories + int(shared),
        has_masked_segment=token_mask is not None,
    )
