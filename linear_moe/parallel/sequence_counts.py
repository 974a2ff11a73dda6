"""How many sequences the rank with the most of them has: packed documents differ from rank to rank.

The ranks agree once a batch, and every layer of the batch reads the number again.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.utils.weak import WeakTensorKeyDictionary

_streams: dict[torch.device, torch.cuda.Stream] = {}
_agreed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def most_sequences(batch: torch.Tensor, sequences: int, group: torch.distributed.ProcessGroup) -> int:
    """The largest number of sequences of a rank. The host waits for the other ranks at the first call for a batch.

    Args:
        batch: a tensor that every layer receives for this batch and for no other, such as its ``cu_seqlens_q``.
        sequences: of this rank.
        group: the ranks; all of them call.
    """
    counts = _agreed.setdefault(batch, {})
    if group.group_name not in counts:
        with _apart(batch.device):
            most = torch.tensor([sequences], device=batch.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX, group=group)
            counts[group.group_name] = int(most)
    return counts[group.group_name]


def _apart(device: torch.device):
    """A stream of its own, so that the host does not wait for the work that is queued on the others."""
    if device.type != "cuda":
        return nullcontext()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return torch.cuda.stream(_streams[device])
