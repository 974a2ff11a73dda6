"""The part of a routing plan for some of the memories, whose number of rows the host does not read.

Shape legend: tokens N, choices of a token k, rows R of the whole plan and R' of the part, sequences B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.route.plan import RoutingPlan


def most_rows(tokens: int, choices: int, memories: int) -> int:
    """R', the most rows that N tokens can have in some memories: a token goes to a memory once at most."""
    return tokens * min(choices, memories)


def plan_of_memories(plan: RoutingPlan, first: int, count: int) -> tuple[RoutingPlan, torch.Tensor]:
    """The rows of memories ``first`` to ``first + count - 1``, then spare rows up to the largest possible number.

    Row r of the part is row ``begin + r`` of the whole plan, where memory ``first`` begins. Everything is computed on
    the device, so that a CUDA graph can hold the part.

    Args:
        plan: without a token mask.
        first, count: at least one memory of the plan.

    Returns:
        the plan of the part, over the same tokens: R' = N min(k, count) rows, row -1 for the choices of other memories,
        token 0 for spare rows, and a segment of spare rows at the end.
        row_here: [R'] int32, the row of the whole plan; -1 for spare rows.

    Raises:
        ValueError: memories that the plan does not have, or a plan with a token mask.
    """
    if plan.has_masked_segment or plan.has_spare_rows:
        raise ValueError("plan must have a row for every choice of every token, got one with masked tokens or a part")
    if first < 0 or count < 1 or first + count > plan.num_all_memories:
        raise ValueError(f"the plan has {plan.num_all_memories} memories, got {count} from memory {first} on")
    tokens, choices = plan.row_of_choice.shape
    rows, sequences = most_rows(tokens, choices, count), plan.num_sequences
    ends = F.pad(plan.memory_offsets, (1, 0))
    begin, end = ends[first : first + 1], ends[first + count : first + count + 1]
    in_use = end - begin

    row = torch.arange(rows, dtype=torch.int32, device=begin.device)
    used = row < in_use
    whole = torch.where(used, begin + row, 0)
    borders = plan.cu_seqlens[first * sequences : (first + count) * sequences + 1] - begin
    row_of_choice = plan.row_of_choice - begin
    here = (row_of_choice >= 0) & (row_of_choice < in_use)
    part = RoutingPlan(
        token_of_row=torch.where(used, plan.token_of_row.index_select(0, whole), 0),
        row_of_choice=torch.where(here, row_of_choice, -1),
        segment_of_row=torch.where(
            used, plan.segment_of_row.index_select(0, whole) - first * sequences, count * sequences
        ),
        position_of_row=torch.where(used, plan.position_of_row.index_select(0, whole), row - in_use),
        cu_seqlens=F.pad(borders, (0, 1), value=rows),
        memory_offsets=plan.memory_offsets[first : first + count] - begin,
        num_sequences=sequences,
        num_all_memories=count,
        has_masked_segment=False,
        has_spare_rows=True,
    )
    return part, torch.where(used, whole, -1)
