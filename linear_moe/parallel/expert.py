"""Memories sharded over Megatron's expert-parallel group: rows go to the ranks of their memories, outputs come back.

A rank's rows are sorted by (memory, sequence, time), so that the rows for another rank lie together, and arrive in the
same order. Arriving rows are sorted by source rank, then memory, sequence and time. The rows of one source rank, memory
and sequence are a piece; a small all-gather gives every rank the number of rows of all pieces, and with them the
segments. Where context-parallel ranks of the group hold slices of the same sequences, the pieces of a sequence are
joined on arrival, and only the shared memory passes states.

A row carries its token and its token's query. Projecting queries on the memory's rank would take their H K numbers,
beside the token's D, out of the volume, and cost k products a token instead of one. The query weight would then not be
part of Megatron's linear layer, with its fused gradient accumulation and its low precision.

Shape legend: N tokens here, R rows here (N k), R' rows that arrive, M routed memories, E ranks, P of them hold one
sequence, B sequences here, D hidden size, H heads here, K key size, V value size.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all

from mom_layers.combine.operation import combine
from mom_layers.mixing import MemoryParameters, SequenceSlice, read_memories
from mom_layers.route.plan import RoutingPlan, build_routing_plan
from mom_layers.route.rows import gather_rows, rows_of_tokens

_streams: dict[torch.device, torch.cuda.Stream] = {}


@dataclass(frozen=True)
class RowExchange:
    """How many rows go from rank to rank, and the plan of the rows that arrive.

    Attributes:
        group: the expert-parallel group.
        sent: number of rows that go to each rank.
        arriving: number of rows that come from each rank.
        plan: the arriving rows sorted by (memory, source rank, sequence, time), a sequence's pieces side by side; its
            tokens are the rows in order of arrival.
    """

    group: torch.distributed.ProcessGroup
    sent: list[int]
    arriving: list[int]
    plan: RoutingPlan

    def dispatch(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [R, C] in this rank's order to the rows that arrive [R', C], in order of arrival."""
        arrived = all_to_all(self.group, rows, self.arriving, self.sent)
        missing = self.plan.num_rows - arrived.shape[0]
        return F.pad(arrived, (0, 0, 0, missing)) if missing else arrived

    def give_back(self, rows: torch.Tensor, kernels: str = "auto") -> torch.Tensor:
        """Rows [R', C] in the plan's order to [R, C] in the order in which their ranks sent them."""
        arrived = rows_of_tokens(rows, self.plan, kernels=kernels)
        return all_to_all(self.group, arrived[: sum(self.arriving)], self.sent, self.arriving)


def plan_arrivals(counts: torch.Tensor, num_rows: int, context_size: int = 1) -> RoutingPlan:
    """The plan of rows that arrive sorted by (source rank, memory, sequence, time).

    Args:
        counts: [E, M here, B] rows of every piece.
        num_rows: their sum, known on the host.
        context_size: P; every P consecutive ranks of the group hold the same sequences, the first rank the earliest
            tokens.
    """
    ranks, memories, sequences = counts.shape

    def by_segment(pieces):  # [E, M, B] -> [M * E / P * B * P]
        return pieces.unflatten(0, (-1, context_size)).permute(2, 0, 3, 1).flatten()

    borders = F.pad(by_segment(counts).cumsum(0), (1, 0)).int()
    arrival = by_segment((counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)).int()
    row = torch.arange(num_rows, dtype=torch.int32, device=counts.device)
    piece = torch.searchsorted(borders, row, right=True, out_int32=True) - 1
    token_of_row = arrival[piece] + row - borders[piece]
    row_of_choice = torch.empty_like(row).scatter_(0, token_of_row.long(), row)[:, None]
    cu_seqlens = borders[::context_size].contiguous()
    segment_of_row = piece // context_size
    num_sequences = ranks // context_size * sequences
    return RoutingPlan(
        token_of_row,
        row_of_choice,
        segment_of_row,
        row - cu_seqlens[segment_of_row],
        cu_seqlens,
        memory_offsets=cu_seqlens[num_sequences::num_sequences].contiguous(),
        num_sequences=num_sequences,
        num_all_memories=memories,
        has_masked_segment=False,
    )


def gather_counts(routed: RoutingPlan, group: torch.distributed.ProcessGroup, ragged: bool) -> torch.Tensor:
    """How many rows of every sequence go to every memory: [source, owner, M here, B], on the device.

    Args:
        routed: this rank's rows, without the shared memory.
        ragged: ranks may hold different numbers of sequences (packed documents); then the host waits for the
            largest number.
    """
    ranks = group.size()
    counts = routed.cu_seqlens.diff().view(routed.num_all_memories, routed.num_sequences)
    if ragged:
        most = torch.tensor([routed.num_sequences], device=counts.device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        counts = F.pad(counts, (0, most.item() - routed.num_sequences))
    gathered = counts.new_empty(ranks * counts.shape[0], counts.shape[1])
    torch.distributed.all_gather_into_tensor(gathered, counts.contiguous(), group=group)
    return gathered.unflatten(0, (ranks, ranks, -1))


def plan_exchange(gathered: torch.Tensor, group: torch.distributed.ProcessGroup, context_size: int = 1) -> RowExchange:
    """The exchange of rows that :func:`gather_counts` counted. The host waits for the exchange's sizes.

    Args:
        gathered: [source, owner, M here, B].
        context_size: P.
    """
    ranks, rank = group.size(), group.rank()
    here = gathered[:, rank]
    sent, arriving = torch.stack([gathered[rank].sum((1, 2)), here.sum((1, 2))]).tolist()
    if not sum(arriving):  # one row of zeros, so that this rank runs the same operations as all others, backward too
        here = F.pad(torch.ones_like(here[:1, :1, :1]), (0, here.shape[2] - 1, 0, here.shape[1] - 1, 0, ranks - 1))
    return RowExchange(group, sent, arriving, plan_arrivals(here, max(1, sum(arriving)), context_size))


def _second_stream(device: torch.device):
    """The stream of the exchange; None on a CPU."""
    if device.type != "cuda":
        return None
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def mix_memories_over_ranks(
    x: torch.Tensor,
    q: torch.Tensor,
    output_gate: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    token_borders: torch.Tensor,
    routed: MemoryParameters,
    shared: MemoryParameters | None,
    *,
    num_memories: int,
    group: torch.distributed.ProcessGroup,
    ragged: bool,
    time_major: bool = False,
    context_size: int = 1,
    sequence_slice: SequenceSlice | None = None,
    kernels: str = "auto",
) -> torch.Tensor:
    """:func:`mom_layers.mixing.mix_memories` where every rank of a group holds some of the memories.

    The shared memory reads this rank's tokens while the ranks exchange rows. The backward pass overlaps the same way:
    autograd runs the gradient of an operation on the operation's stream, the latest operation first.

    Args:
        x: [N, D]. q: [N, H K] before convolution. output_gate: [N, H V] before SiLU.
        weights: [N, k] the router's.
        ids: [N, k] the router's, sequence by sequence whatever ``time_major`` says.
        token_borders: [B + 1] int32, first token of every sequence, then N.
        routed: parameters of this rank's memories, M / E of them (or one projection for all memories).
        shared: parameters of the shared memory; None without a shared memory.
        num_memories: M, of all ranks together.
        group: the expert-parallel group.
        ragged: ranks may hold different numbers of sequences.
        time_major: x, q, output_gate, weights and y are stored time first, [T, B] flattened.
        context_size: P, which divides the group's size.
        sequence_slice: the slice of this rank where P > 1, for the shared memory.

    Returns:
        y [N, H V] before the output projection.
    """
    stream = _second_stream(x.device)
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())

    def beside():
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    with beside():  # before the shared memory's kernels fill the GPU, so that the host gets the sizes while they run
        plan = build_routing_plan(ids, token_borders, num_memories=num_memories, shared=False, kernels=kernels)
        plan = plan.time_major() if time_major else plan
        counts = None if ragged else gather_counts(plan, group, ragged)
    outputs = []
    if shared is not None:
        shared_plan = build_routing_plan(
            torch.zeros_like(ids[:, :1]), token_borders, num_memories=1, shared=False, kernels=kernels
        )
        shared_plan = shared_plan.time_major() if time_major else shared_plan
        o, _ = read_memories(x, q, shared_plan, shared, sequence_slice=sequence_slice, kernels=kernels)
        outputs.append(o)
    with beside():
        counts = gather_counts(plan, group, ragged) if counts is None else counts
        exchange = plan_exchange(counts, group, context_size)
        arrived = exchange.dispatch(gather_rows(torch.cat([x, q], dim=1), plan, kernels=kernels))
    if stream is not None:
        main = torch.cuda.current_stream()
        main.wait_stream(stream)
        for tensor in (arrived, plan.row_of_choice, *_tensors(exchange.plan)):
            tensor.record_stream(main)

    x_here, q_here = arrived.split([x.shape[1], q.shape[1]], dim=1)
    o_here, _ = read_memories(x_here, q_here, exchange.plan, routed, kernels=kernels)
    outputs.insert(0, exchange.give_back(o_here.flatten(1), kernels).unflatten(1, o_here.shape[1:]))
    row_of_choice = plan.row_of_choice
    if shared is not None:
        row_of_choice = torch.cat([row_of_choice, shared_plan.row_of_choice + plan.num_rows], dim=1)
    y = combine(
        torch.cat(outputs), weights, row_of_choice, output_gate.unflatten(1, o_here.shape[1:]), routed.norm_weight,
        eps=routed.settings.norm_eps, kernels=kernels,
    )  # fmt: skip
    return y.flatten(1)


def _tensors(plan: RoutingPlan) -> list[torch.Tensor]:
    values = [getattr(plan, field.name) for field in fields(plan)]
    return [value for value in values if isinstance(value, torch.Tensor)]
