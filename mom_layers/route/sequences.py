"""The rows of a layer of one memory alone: every token once, sequence by sequence, without a router.

Shape legend: N tokens of the whole batch; B sequences or packed documents.
"""

from __future__ import annotations

import torch

from mom_layers.route.plan import RoutingPlan, build_routing_plan


def plan_sequences(
    cu_seqlens: torch.Tensor,
    num_tokens: int,
    *,
    token_mask: torch.Tensor | None = None,
    time_major: bool = False,
    kernels: str = "auto",
) -> RoutingPlan:
    """The plan of one memory that every token goes to: segments are the sequences. The host reads no data.

    Where tokens lie sequence by sequence, rows are the tokens as they lie, and no operation gathers.

    Args:
        cu_seqlens: [B + 1] int32, the first token of every sequence, then N; borders are right by construction.
        num_tokens: N.
        token_mask: [N] bool, False at padding, which reaches no memory: the rows of padding lie in one more segment.
        time_major: tokens are stored time first, [T, B] flattened, and the sequences have one length T.
        kernels: "auto", "torch" or "triton", for the plan of masked tokens.
    """
    if token_mask is not None:
        ids = torch.zeros(num_tokens, 1, dtype=torch.int32, device=cu_seqlens.device)
        return build_routing_plan(
            ids, cu_seqlens, num_memories=1, shared=False, token_mask=token_mask, kernels=kernels
        )  # fmt: skip
    cu_seqlens = cu_seqlens.to(torch.int32)
    rows = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
    segments = torch.searchsorted(cu_seqlens, rows, right=True, out_int32=True) - 1
    plan = RoutingPlan(
        token_of_row=rows,
        row_of_choice=rows[:, None],
        segment_of_row=segments,
        position_of_row=rows - cu_seqlens.index_select(0, segments),
        cu_seqlens=cu_seqlens,
        memory_offsets=cu_seqlens[-1:],
        num_sequences=cu_seqlens.shape[0] - 1,
        num_all_memories=1,
        has_masked_segment=False,
        rows_are_tokens=not time_major,
    )
    return plan.time_major() if time_major else plan
