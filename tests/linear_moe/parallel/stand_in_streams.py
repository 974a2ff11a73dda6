"""Stand-ins for CUDA's streams and events, whose order :mod:`stream_check` keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from stream_check import StreamCheck

DEVICE = torch.device("cuda", 0)


class Stream:
    """In place of ``torch.cuda.Stream``."""

    device = DEVICE

    def __init__(self, check: StreamCheck, number: int):
        self.check, self.number = check, number

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def wait_event(self, event: Event) -> None:
        self.check.order.stream_wait_for_event(self.number, event.number)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self.check)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.check.order.all_streams_wait_for_stream(self.number)


class Event:
    """In place of ``torch.cuda.Event``."""

    def __init__(self, check: StreamCheck):
        self.check, self.number = check, next(check.numbers)
        check.order.create_event(self.number)

    def record(self, stream: Stream | None = None) -> None:
        self.check.order.record_state(self.number, (stream or self.check.current_stream()).number)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.check.current_stream()).wait_event(self)

    def synchronize(self) -> None:
        self.check.order.all_streams_wait_for_event(self.number)


class Work:
    """In place of the result of an asynchronous collective, whose tensors live until the wait."""

    def __init__(self, work, stream: Stream, tensors: list[torch.Tensor]):
        self.work, self.stream, self.tensors = work, stream, tensors

    def wait(self) -> None:
        self.work.wait()
        self.stream.check.current_stream().wait_stream(self.stream)
        self.tensors = []
