"""The exchange by reading: every rank pulls the rows that its memories need out of the other GPUs' memory, by index.

The GPUs of a group share buffers (PyTorch's symmetric memory), so that a kernel on one GPU reads the rows of another
over NVLink. A pull writes this rank's rows to its own buffer, waits on the device until all ranks have done so, reads
by index what this rank needs, and waits until all ranks have read. Four pulls make a layer: tokens to the rows of the
memories here, answers back to the tokens, and the gradients of both the other way. The pull of tokens is the gather
that a layer makes anyway.

The GPUs of the group must be able to read each other's memory: they are in one machine, connected by NVLink or PCIe.

Shape legend: N tokens of a rank, E ranks, R' rows of a rank with the spare rows, k memories of a token, C channels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.distributed import ProcessGroup

from linear_moe.parallel.all_ranks import plan_all_ranks
from linear_moe.parallel.choices import Choices, Returned


@dataclass(frozen=True)
class PeerBuffer:
    """A buffer that every rank of a group has, and that all ranks can read.

    Attributes:
        rows: [rows, C], this rank's.
        pointers: [E] int64 on the device, the address of every rank's buffer.
        barrier: waits, on the device, until all ranks' streams have come here.
    """

    rows: torch.Tensor
    pointers: torch.Tensor
    barrier: Callable[[], None]


KINDS = ("tokens", "answers", "gradients of tokens", "gradients of answers")
"""Of buffers: what they hold."""


class PeerBuffers:
    """The buffers of a group, which all layers share. Each layer holds this object: with the last layer the buffers go.

    Take the object from :meth:`of`.
    """

    _of_groups: weakref.WeakValueDictionary[int, PeerBuffers] = weakref.WeakValueDictionary()

    def __init__(self, group: ProcessGroup):
        self.group = group  # held, so that no later group has this one's id
        self.buffers: dict[tuple, PeerBuffer] = {}

    @classmethod
    def of(cls, group: ProcessGroup) -> PeerBuffers:
        """The group's object, new where no layer holds it."""
        found = cls._of_groups.get(id(group))
        if found is None:
            found = cls._of_groups[id(group)] = cls(group)
        return found

    def buffer(self, kind: str, rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> PeerBuffer:
        """The buffer of a kind and shape. The first call of a shape waits for all ranks.

        Each kind is used on one stream alone, so that a buffer's pulls follow each other on the device.
        """
        key = (kind, rows, channels, dtype, device)
        if key not in self.buffers:
            self.buffers[key] = symmetric_buffer(*key, self.group)
        return self.buffers[key]


def symmetric_buffer(
    kind: str, rows: int, channels: int, dtype: torch.dtype, device: torch.device, group: ProcessGroup
) -> PeerBuffer:
    """A new buffer in symmetric memory; all ranks make it together."""
    import torch.distributed._symmetric_memory as symmetric_memory

    tensor = symmetric_memory.empty(rows, channels, dtype=dtype, device=device)
    handle = symmetric_memory.rendezvous(tensor, group.group_name)
    peers = [handle.get_remote_tensor(rank, tensor.shape, dtype) for rank in range(group.size())]
    pointers = torch.tensor([peer.data_ptr() for peer in peers], dtype=torch.int64, device=device)
    # Buffers may lie in one allocation, whose signals they share: a channel for each kind keeps streams apart.
    return PeerBuffer(tensor, pointers, partial(handle.barrier, KINDS.index(kind)))


def pull(buffer: PeerBuffer, tensors: tuple[torch.Tensor, ...], wanted: torch.Tensor) -> list[torch.Tensor]:
    """Writes this rank's rows for others to read, and reads others' rows.

    Args:
        buffer: of as many rows as the tensors, and the sum of their channels.
        tensors: [rows, C] each, the same shapes on all ranks.
        wanted: [out rows, choices] int32, rank * rows + row; -1 for no row. A result is the sum over the choices.

    Returns:
        [out rows, C] for every tensor.
    """
    from linear_moe.parallel.peer_memory_triton import pull_rows

    first = 0
    for tensor in tensors:
        buffer.rows[:, first : first + tensor.shape[1]].copy_(tensor)
        first += tensor.shape[1]
    buffer.barrier()
    results, first = [], 0
    for tensor in tensors:
        results.append(pull_rows(buffer.pointers, wanted, buffer.rows, first, tensor.shape[1]).to(tensor.dtype))
        first += tensor.shape[1]
    buffer.barrier()
    return results


class _Pull(torch.autograd.Function):
    """Rows to where they are wanted. The backward pass pulls the gradients back, a sum over the places of each row."""

    @staticmethod
    def forward(ctx, make_buffer, kind, wanted, wanted_back, *tensors):
        ctx.save_for_backward(wanted_back)
        results = tuple(pull(_buffer_of(make_buffer, kind, tensors), tensors, wanted))
        # Made here, because all ranks must make a buffer at the same time, and autograd has threads of its own.
        ctx.buffer = _buffer_of(make_buffer, f"gradients of {kind}", results) if any(ctx.needs_input_grad) else None
        return results

    @staticmethod
    def backward(ctx, *gradients):
        (wanted_back,) = ctx.saved_tensors
        return None, None, None, None, *pull(ctx.buffer, gradients, wanted_back)


def _buffer_of(make_buffer, kind: str, tensors) -> PeerBuffer:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return make_buffer(kind, tensors[0].shape[0], sum(tensor.shape[1] for tensor in tensors), dtype, tensors[0].device)


class PeerMemory:
    """Implements :class:`linear_moe.parallel.expert.Exchange` by pulls.

    Args:
        make_buffer: (kind, rows, channels, dtype, device) -> the buffer; the group's :class:`PeerBuffers` where absent.
    """

    reads_answers_again = False

    def __init__(self, choices: Choices, make_buffer: Callable[..., PeerBuffer] | None = None):
        self.make_buffer = make_buffer or PeerBuffers.of(choices.group).buffer
        all_ranks = plan_all_ranks(choices)
        self.topk = choices.ids.shape[1]
        self.choice_of_row = all_ranks.choice_of_row[:, None]
        self.row_of_my_choice = all_ranks.row_of_my_choice
        row = torch.arange(all_ranks.plan.num_rows, dtype=torch.int32, device=choices.ids.device)
        self.token_of_row = torch.where(self.choice_of_row >= 0, self.choice_of_row // self.topk, -1)
        # The rows arrive at their places: the tokens of this plan are the rows themselves.
        self.plan = replace(all_ranks.plan, token_of_row=row, row_of_choice=row[:, None], rows_are_tokens=True)

    def bring(self, x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _Pull.apply(self.make_buffer, "tokens", self.token_of_row, self.row_of_my_choice, x, q)

    def take_home(self, o: torch.Tensor, weights: torch.Tensor) -> Returned:
        wanted = self.row_of_my_choice.view(-1, 1)
        (rows,) = _Pull.apply(self.make_buffer, "answers", wanted, self.choice_of_row, o.flatten(1))
        row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
        return Returned(rows.unflatten(1, o.shape[1:]), weights, row.view(weights.shape))

    def tensors(self) -> list[torch.Tensor]:
        return [self.choice_of_row, self.row_of_my_choice, *self.plan.tensors()]
