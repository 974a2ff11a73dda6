"""A second stream of a device, for work that goes on beside the work of the current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_streams: dict[torch.device, torch.cuda.Stream] = {}


class SecondStream:
    """A fork of the current stream. Inside :meth:`beside` work goes to the second stream; :meth:`join` ends the fork.

    On a CPU everything runs in order. All forks of a device share one stream.
    """

    def __init__(self, device: torch.device):
        self.stream = None
        if device.type == "cuda":
            self.stream = _streams.get(device) or _streams.setdefault(device, torch.cuda.Stream(device))
            self.stream.wait_stream(torch.cuda.current_stream(device))

    def beside(self) -> AbstractContextManager:
        """Work inside goes to the second stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def lend(self, x: torch.Tensor) -> torch.Tensor:
        """x for an operation of the second stream that reads x again in the backward pass. Use the returned tensor.

        The last to free x is then a node of the current stream, which has waited for the gradient of x. Otherwise the
        allocator could hand the memory of x to the current stream's next tensor while the second stream reads x.
        """
        return x if self.stream is None else _Lent.apply(x)

    def join(self, *tensors: torch.Tensor) -> None:
        """The current stream waits for the second stream, whose tensors may then be read there."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(current)


class _Lent(torch.autograd.Function):
    """x itself, held until the gradient of x has come."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad
