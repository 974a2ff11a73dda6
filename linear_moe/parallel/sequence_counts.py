"""What the ranks of an expert-parallel group agree on before they exchange: sequences and tokens of a batch.

Packed documents differ in number from rank to rank: the ranks agree once a batch, and every layer of the batch reads
the number again. Sequences of one length are the same on all ranks of a training: the ranks compare once for a shape.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch.distributed import ProcessGroup
from torch.utils.weak import WeakTensorKeyDictionary

_streams: dict[torch.device, torch.cuda.Stream] = {}
_agreed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_compared: WeakKeyDictionary[ProcessGroup, set[tuple[int, int]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Counts:
    """Of a batch, over the ranks of a group.

    Attributes:
        sequences: the largest number of sequences of a rank.
        tokens, fewest_tokens: the largest and the smallest number of tokens of a rank.
    """

    sequences: int
    tokens: int
    fewest_tokens: int

    def check_same_tokens(self, exchange: str) -> None:
        """Raises ValueError, on all ranks together, where an exchange needs the same number of tokens on every rank."""
        if self.tokens != self.fewest_tokens:
            raise ValueError(
                f"--mom-expert-exchange {exchange} needs the same number of tokens on every expert-parallel rank, and "
                f"a rank has {self.fewest_tokens} tokens where another has {self.tokens}: use "
                "--mom-expert-exchange all-to-all"
            )


def counts_of_batch(batch: torch.Tensor, sequences: int, tokens: int, group: ProcessGroup) -> Counts:
    """The counts of a batch of packed documents. The host waits for the other ranks at the first call for a batch.

    Args:
        batch: a tensor that every layer receives for this batch and for no other, such as its ``cu_seqlens_q``.
        sequences, tokens: of this rank.
        group: the ranks; all of them call.
    """
    counts = _agreed.setdefault(batch, {})
    if group.group_name not in counts:
        counts[group.group_name] = counts_now(sequences, tokens, group, batch.device)
    return counts[group.group_name]


def counts_now(sequences: int, tokens: int, group: ProcessGroup, device: torch.device) -> Counts:
    """The counts of a batch; the host waits for the other ranks at every call."""
    with _apart(device):
        most = torch.tensor([sequences, tokens, -tokens], device=device)
        torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
        most = most.tolist()
    return Counts(most[0], most[1], -most[2])


def compare_once(exchange: str, sequences: int, tokens: int, group: ProcessGroup, device: torch.device) -> None:
    """Raises ValueError, on all ranks together, where a rank's batch has another number of tokens.

    The host waits for the other ranks at the first call for a shape, and not while a CUDA graph is captured.
    """
    shapes = _compared.setdefault(group, set())
    if (sequences, tokens) in shapes or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    counts_now(sequences, tokens, group, device).check_same_tokens(exchange)
    shapes.add((sequences, tokens))


def _apart(device: torch.device):
    """A stream of its own, so that the host does not wait for the work that is queued on the others."""
    if device.type != "cuda":
        return nullcontext()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return torch.cuda.stream(_streams[device])
