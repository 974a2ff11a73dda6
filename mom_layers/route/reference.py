"""The plain loop of the routing plan."""

from __future__ import annotations

from mom_layers.common.reference import bounds


def routing_plan_reference(memory_ids, token_cu_seqlens, num_memories, shared=True):
    """Lists every row as (memory, sequence, token) in order. Returns token_of_row and cu_seqlens as Python lists."""
    token_of_row, cu_seqlens = [], [0]
    for memory in range(num_memories + int(shared)):
        for first, last in bounds(token_cu_seqlens):
            for token in range(first, last):
                if memory == num_memories or memory in memory_ids[token].tolist():
                    token_of_row.append(token)
            cu_seqlens.append(len(token_of_row))
    return token_of_row, cu_seqlens
