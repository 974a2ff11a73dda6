"""The exchange of exactly the rows that are needed: an all-to-all, whose sizes the host reads in every layer.

A rank's rows are sorted by (memory, sequence, time), so that the rows for another rank lie together, and arrive in the
same order. Arriving rows are sorted by source rank, then memory, sequence and time. The rows of one source rank, memory
and sequence are a piece; a small all-gather gives every rank the number of rows of all pieces, and with them the
segments. Where context-parallel ranks of the group hold slices of the same sequences, the pieces of a sequence are
joined on arrival, and only the shared memory passes states.

Shape legend: N tokens here, R rows here (N k), R' rows that arrive, M routed memories, E ranks, P of them hold one
sequence, B sequences here, D hidden size, H heads here, K key size, V value size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import all_to_all

from linear_moe.parallel.choices import Choices, Returned
from mom_layers.route.plan import RoutingPlan, build_routing_plan
from mom_layers.route.rows import gather_rows, rows_of_tokens


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


def gather_counts(routed: RoutingPlan, group: torch.distributed.ProcessGroup, most_sequences: int) -> torch.Tensor:
    """How many rows of every sequence go to every memory: [source, owner, M here, B], on the device.

    Args:
        routed: this rank's rows, without the shared memory.
        most_sequences: B, the largest number of sequences of a rank.
    """
    ranks = group.size()
    counts = routed.cu_seqlens.diff().view(routed.num_all_memories, routed.num_sequences)
    counts = F.pad(counts, (0, most_sequences - routed.num_sequences))
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


class AllToAll:
    """Implements :class:`linear_moe.parallel.expert.Exchange` by an all-to-all of rows."""

    plan: RoutingPlan
    reads_answers_again = False

    def __init__(self, choices: Choices):
        self.choices = choices
        plan = build_routing_plan(
            choices.ids, choices.token_borders, num_memories=choices.num_memories, shared=False, kernels=choices.kernels
        )
        self.routed = plan.time_major() if choices.time_major else plan
        # On their way before the shared memory's kernels fill the GPU, so that the host reads them while those run.
        self.counts = gather_counts(plan, choices.group, choices.most_sequences)

    def bring(self, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.exchange = plan_exchange(self.counts, self.choices.group, self.choices.context_size)
        self.plan = self.exchange.plan
        rows = gather_rows(torch.cat([x, q], dim=1), self.routed, kernels=self.choices.kernels)
        return self.exchange.dispatch(rows).split([x.shape[1], q.shape[1]], dim=1)

    def take_home(self, o: torch.Tensor, weights: torch.Tensor) -> Returned:
        rows = self.exchange.give_back(o.flatten(1), self.choices.kernels).unflatten(1, o.shape[1:])
        return Returned(rows, weights, self.routed.row_of_choice)

    def tensors(self) -> list[torch.Tensor]:
        return [self.routed.row_of_choice, *self.plan.tensors()]
