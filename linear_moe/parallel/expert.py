"""Memories sharded over Megatron's expert-parallel group: tokens go to the ranks of their memories, outputs come back.

How tokens and outputs travel is an :class:`Exchange`. There are three, and `--mom-expert-exchange` chooses:

    all-to-all    exactly the rows that are needed; the host waits for their number in every layer
    all-gather    every rank receives every token, and sends back its memories' share of every token's sum
    peer-memory   every rank reads the rows that it needs from the other GPUs' memory, by index

With the last two the host reads nothing. Every rank receives all ranks' choices and plans its own memories' rows on its
device, in buffers that have room for the worst case: no row is ever dropped, and a CUDA graph can hold the layer.

A row carries its token and its token's query. Projecting queries on the memory's rank would take their H K numbers,
beside the token's D, out of the volume, and cost k products a token instead of one. The query weight would then not be
part of Megatron's linear layer, with its fused gradient accumulation and its low precision.

Shape legend: N tokens here, R' rows of the memories here, M routed memories, E ranks, P of them hold one sequence, B
sequences here, D hidden size, H heads here, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from linear_moe.parallel.all_gather import AllGather
from linear_moe.parallel.all_to_all import AllToAll
from linear_moe.parallel.choices import Choices, Returned
from linear_moe.parallel.peer_memory import PeerMemory
from linear_moe.parallel.streams import SecondStream
from mom_layers.combine.operation import combine
from mom_layers.mixing import MemoryParameters, SequenceSlice, project_rows, read_memories, run_rule
from mom_layers.route.plan import RoutingPlan, build_routing_plan


class Exchange(Protocol):
    """One layer's exchange of tokens and outputs. Made from :class:`Choices`; the calls come in the order below."""

    plan: RoutingPlan
    """The rows of the memories here, once :meth:`bring` has returned."""
    reads_answers_again: bool
    """Whether the backward pass of :meth:`take_home` reads ``o``."""

    def bring(self, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [N, D] and q [N, H K] of this rank's tokens. Returns both for the tokens of ``plan``."""
        ...

    def take_home(self, o: torch.Tensor, weights: torch.Tensor) -> Returned:
        """o [R', H, V], read by the plan's rows, and the router's weights [N, k] of this rank's tokens. Returns what
        these tokens have read."""
        ...

    def tensors(self) -> list[torch.Tensor]:
        """The tensors that were made before ``take_home`` and are read later."""
        ...


EXCHANGES: dict[str, Callable[[Choices], Exchange]] = {
    "all-to-all": AllToAll,
    "all-gather": AllGather,
    "peer-memory": PeerMemory,
}
"""By the names of `linear_moe.config.EXPERT_EXCHANGES`."""


def mix_memories_over_ranks(
    x: torch.Tensor,
    q: torch.Tensor,
    output_gate: torch.Tensor,
    weights: torch.Tensor,
    choices: Choices,
    routed: MemoryParameters,
    shared: MemoryParameters | None,
    *,
    exchange: str = "all-to-all",
    sequence_slice: SequenceSlice | None = None,
) -> torch.Tensor:
    """:func:`mom_layers.mixing.mix_memories` where every rank of a group holds some of the memories.

    The shared memory's rows are projected and convolved while tokens travel, and its recurrence runs while answers
    travel. The backward pass overlaps the same way: autograd runs the gradient of an operation on the operation's
    stream, the latest operation first.

    Args:
        x: [N, D]. q: [N, H K] before convolution. output_gate: [N, H V] before SiLU.
        weights: [N, k] the router's.
        choices: the router's, and how tokens are stored.
        routed: parameters of this rank's memories, M / E of them (or one projection for all memories).
        shared: parameters of the shared memory; None without a shared memory.
        exchange: a name of EXCHANGES. All but "all-to-all" need the same N on every rank.
        sequence_slice: the slice of this rank where P > 1, for the shared memory.

    Returns:
        y [N, H V] before the output projection.
    """
    kernels, second = choices.kernels, SecondStream(x.device)
    with second.beside():
        travel = EXCHANGES[exchange](choices)
    if shared is not None:
        shared_plan = build_routing_plan(
            torch.zeros_like(choices.ids[:, :1]), choices.token_borders, num_memories=1, shared=False, kernels=kernels
        )
        shared_plan = shared_plan.time_major() if choices.time_major else shared_plan
        shared_rows, tails = project_rows(x, q, shared_plan, shared, sequence_slice=sequence_slice, kernels=kernels)
    with second.beside():
        x_here, q_here = travel.bring(x, q)
    second.join(x_here, q_here, *travel.tensors())

    o_here, _ = read_memories(x_here, q_here, travel.plan, routed, kernels=kernels)
    second = SecondStream(x.device)
    if travel.reads_answers_again:
        o_here = second.lend(o_here)
    with second.beside():
        o, weights, row_of_choice = travel.take_home(o_here, weights)
    o_shared = None
    if shared is not None:
        o_shared, _ = run_rule(shared_rows, tails, shared_plan, shared, None, False, sequence_slice, kernels)
    second.join(o, weights, row_of_choice)
    if o_shared is not None:
        row_of_choice = torch.cat([row_of_choice, shared_plan.row_of_choice + o.shape[0]], dim=1)
        o = torch.cat([o, o_shared])
    y = combine(
        o, weights, row_of_choice, output_gate.unflatten(1, o.shape[1:]), routed.norm_weight,
        eps=routed.settings.norm_eps, kernels=kernels,
    )  # fmt: skip
    return y.flatten(1)
