"""Every rank's choices on every rank, and from them the rows of the memories here: without a word from the host.

The ids of all tokens are N k small numbers a rank, so that one all-gather of them costs little. Each rank then builds
the plan of all ranks' tokens, and takes its memories' part, whose buffers have room for every token in as many of the
memories as it may choose: E N min(k, M / E) rows. On average N k rows are in use; the rest are spare rows, which cost
memory and no products.

Shape legend: N tokens of a rank, the same on all ranks, E ranks, P of them hold one sequence, B sequences of a rank,
T tokens of a sequence on one rank, k memories of a token, M routed memories, R' rows of a rank with the spare rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from linear_moe.parallel.choices import Choices
from linear_moe.parallel.collectives import gather
from mom_layers.route.plan import RoutingPlan, build_routing_plan
from mom_layers.route.plan_part import plan_of_memories


@dataclass(frozen=True)
class AllRanks:
    """The rows here, and where they come from.

    Tokens of all ranks are numbered e N + n: token n of rank e, as the rank stores its tokens.

    Attributes:
        plan: the rows of the memories here, over the E N tokens of all ranks.
        choice_of_row: [R'] int32, token * k + choice; -1 for spare rows.
        row_of_my_choice: [N, k] int32, for this rank's tokens: owner * R' + row at the owner.
    """

    plan: RoutingPlan
    choice_of_row: torch.Tensor
    row_of_my_choice: torch.Tensor


def _borders(choices: Choices) -> torch.Tensor:
    """Borders of the sequences of all ranks, where the P ranks of a sequence follow each other."""
    ranks, context = choices.group.size(), choices.context_size
    tokens, device = choices.ids.shape[0], choices.ids.device
    if not choices.ragged:
        length = context * tokens // (choices.token_borders.shape[0] - 1)
        return torch.arange(0, ranks * tokens + 1, length, dtype=torch.int32, device=device)
    most, own = choices.most_sequences, choices.token_borders
    own = torch.cat([own, own[-1:].expand(most + 1 - own.shape[0])])  # empty sequences at the end
    # A document's first token in the whole row is the number of tokens before that token, summed over the slices.
    groups = gather(own[None], choices.group).unflatten(0, (-1, context)).sum(1, dtype=torch.int32)
    first = torch.arange(0, ranks * tokens, context * tokens, dtype=torch.int32, device=device)
    return F.pad((groups[:, :-1] + first[:, None]).flatten(), (0, 1), value=ranks * tokens)


def _orders(choices: Choices) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Numbers of all ranks' tokens in the order of (sequence, time), and the inverse; None where it is their order."""
    ranks, context = choices.group.size(), choices.context_size
    sequences = choices.token_borders.shape[0] - 1
    if choices.ragged or sequences == 1 or (context == 1 and not choices.time_major):
        return None
    number = torch.arange(ranks * choices.ids.shape[0], dtype=torch.int32, device=choices.ids.device)
    groups = ranks // context
    if choices.time_major:  # stored as [group, slice, time, sequence]
        to_time, to_storage, stored = (0, 3, 1, 2), (0, 2, 3, 1), (groups, context, -1, sequences)
    else:  # stored as [group, slice, sequence, time]
        to_time, to_storage, stored = (0, 2, 1, 3), (0, 2, 1, 3), (groups, context, sequences, -1)
    token_in_order = number.view(stored).permute(to_time).flatten()
    place_of_token = number.view(groups, sequences, context, -1).permute(to_storage).flatten()
    return token_in_order, place_of_token


def plan_all_ranks(choices: Choices) -> AllRanks:
    """Gathers all ranks' choices and plans the rows of the memories here. The host reads no data.

    Every rank must have the same number of tokens.

    Raises:
        ValueError: more rows than int32 numbers.
    """
    group = choices.group
    ranks, rank = group.size(), group.rank()
    tokens, topk = choices.ids.shape
    per_rank = choices.num_memories // ranks
    ids = gather(choices.ids.int(), group)
    if not choices.ragged and choices.context_size > 1:  # the slices of a sequence one after the other
        sequences = choices.token_borders.shape[0] - 1
        ids = ids.view(ranks // choices.context_size, choices.context_size, sequences, -1, topk).transpose(1, 2)
        ids = ids.reshape(ranks * tokens, topk)
    whole = build_routing_plan(
        ids, _borders(choices), num_memories=choices.num_memories, shared=False, kernels=choices.kernels
    )
    part, whole_row = plan_of_memories(whole, rank * per_rank, per_rank)
    if ranks * part.num_rows >= 2**31:
        raise ValueError(
            f"rows of all ranks are numbered in int32: {ranks} ranks with room for {part.num_rows} rows each are too "
            "many: give fewer tokens a micro-batch, or --mom-expert-exchange all-to-all"
        )

    # The choice that every row stands for, by the number of its token.
    number = torch.arange(ranks * tokens * topk, dtype=torch.int32, device=ids.device)
    choice_of_whole_row = torch.empty_like(number).scatter_(0, whole.row_of_choice.flatten().long(), number)
    choice = choice_of_whole_row.index_select(0, whole_row.clamp(min=0))
    # Every choice's row at the owner of its memory.
    first_row = F.pad(whole.memory_offsets[per_rank - 1 : -1 : per_rank], (1, 0))
    owner = ids.long() // per_rank
    row = whole.row_of_choice - first_row[owner] + (owner * part.num_rows).int()

    if (orders := _orders(choices)) is not None:
        token_in_order, place_of_token = orders
        choice = token_in_order.index_select(0, choice // topk) * topk + choice % topk
        row = row.index_select(0, place_of_token)
        part = replace(
            part,
            token_of_row=token_in_order.index_select(0, part.token_of_row),
            row_of_choice=part.row_of_choice.index_select(0, place_of_token),
        )
    choice_of_row = torch.where(whole_row >= 0, choice, -1)
    return AllRanks(part, choice_of_row, row[rank * tokens : (rank + 1) * tokens].contiguous())
