"""What an exchange of rows between expert-parallel ranks starts from, and what comes back.

Shape legend: N tokens here, k memories of a token, M routed memories, E ranks, B sequences here, H heads here, V value
size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Choices:
    """The router's choices on this rank, in one layer.

    Attributes:
        ids: [N, k] sequence by sequence, whatever ``time_major`` says.
        token_borders: [B + 1] int32, first token of every sequence, then N.
        num_memories: M, of all ranks together; rank e has memories e M / E up to (e + 1) M / E.
        group: the expert-parallel group.
        most_sequences: the largest B of a rank, which all ranks have agreed on.
        ragged: the sequences are packed documents of any lengths, in one row of tokens; else they have one length.
        time_major: tokens are stored time first, [T, B] flattened.
        context_size: P; every P consecutive ranks of the group hold the same sequences, the first rank the earliest
            tokens.
        kernels: "auto", "torch" or "triton".
    """

    ids: torch.Tensor
    token_borders: torch.Tensor
    num_memories: int
    group: torch.distributed.ProcessGroup
    most_sequences: int
    ragged: bool
    time_major: bool = False
    context_size: int = 1
    kernels: str = "auto"


class Returned(NamedTuple):
    """What this rank's tokens have read from the routed memories, as `mom_layers.combine.operation.combine` takes it.

    Attributes:
        o: [N k', H, V].
        weights: [N, k'].
        row_of_choice: [N, k'] int32, rows of o.
    """

    o: torch.Tensor
    weights: torch.Tensor
    row_of_choice: torch.Tensor
