"""The exchange by collectives of one size: all ranks receive all tokens, and sum what the memories answer.

An all-gather brings every token with its query to every rank, where each memory's rows are read by index, as a layer on
one GPU reads them. The answers go home in a reduce-scatter: each rank sends, for every token, the weighted sum over its
own memories. Both move E / k times as much as the rows that are needed, so that this exchange is for groups that are
not much larger than k, and for groups whose ranks cannot read each other's memory.

Shape legend: N tokens of a rank, E ranks, R' rows of the memories here, k memories of a token, C channels.
"""

from __future__ import annotations

import torch

from linear_moe.parallel.all_ranks import plan_all_ranks
from linear_moe.parallel.choices import Choices, Returned
from linear_moe.parallel.collectives import Gather, ScatterSum
from linear_moe.parallel.weighted_rows import weighted_sum


class AllGather:
    """Implements :class:`linear_moe.parallel.expert.Exchange` by an all-gather and a reduce-scatter."""

    reads_answers_again = True  # for the gradient of the weights

    def __init__(self, choices: Choices):
        self.choices = choices
        self.all_ranks = plan_all_ranks(choices)
        self.plan = self.all_ranks.plan

    def bring(self, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return Gather.apply(x, self.choices.group), Gather.apply(q, self.choices.group)

    def take_home(self, o: torch.Tensor, weights: torch.Tensor) -> Returned:
        group = self.choices.group
        sums = weighted_sum(
            o.flatten(1), Gather.apply(weights, group), self.plan, self.all_ranks.choice_of_row,
            kernels=self.choices.kernels,
        )  # fmt: skip
        own = ScatterSum.apply(sums, group).unflatten(1, o.shape[1:])
        row = torch.arange(own.shape[0], dtype=torch.int32, device=own.device)[:, None]
        return Returned(own, torch.ones_like(weights[:, :1]).detach(), row)

    def tensors(self) -> list[torch.Tensor]:
        return [self.all_ranks.choice_of_row, *self.plan.tensors()]
