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

    def join(self, *tensors: torch.Tensor) -> None:
        """The current stream waits for the second stream, whose tensors may then be read there."""
        if self.stream is None:
            return
        current = torch.cuda.current_stream(self.stream.device)
        current.wait_stream(self.stream)
        for tensor in tensors:
            tensor.record_stream(current)
