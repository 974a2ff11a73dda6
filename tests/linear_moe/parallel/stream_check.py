"""Finds races between CUDA streams without a GPU: what is not ordered, and memory that is freed too early.

Inside :func:`checked_streams` streams and events are stand-ins, and a tensor on the CPU counts as one on the GPU.
Operators run one after the other, as ever on a CPU. For each operator the check notes the stream on which a GPU would
run the operator, and the memory that the operator reads and writes. Vector clocks (those of PyTorch's CUDA sanitizer)
tell which operators are ordered: those of one stream, and those before an event for which a stream has waited. These
are races:

    a write of memory that another stream reads or writes without order, and a read of memory that another stream writes
    memory freed while another stream's read or write is not ordered before the work of the stream that allocated the
    memory, unless ``record_stream`` was called: the allocator hands the memory to that stream's next tensor

A backward pass follows the rules of autograd's engine: a node runs on the stream that was current when the node was
made, waits for the nodes whose gradients it takes, and calls ``record_stream`` for these gradients. A node's sequence
number tells its stream. An asynchronous collective is on a stream of its own until the wait.

The check sees PyTorch's operators, and no Triton kernels: layers run with kernels="torch".
"""

from __future__ import annotations

import inspect
import re
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from stand_in_streams import DEVICE, Event, Stream, Work
from torch.cuda._sanitizer import DEFAULT_STREAM_ID, StreamSynchronizations
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MAIN = DEFAULT_STREAM_ID
ENGINE = -1  # autograd's engine adds gradients, between two nodes
METADATA_ONLY = re.compile(r"aten::(new_.*|.*_like)$")
COLLECTIVES = {
    "c10d::_allgather_base_": "output_tensor",
    "c10d::_reduce_scatter_base_": "output_tensor",
    "c10d::alltoall_base_": "output",
    "c10d::allreduce_": "tensors",
    "c10d::barrier": "",
}
"""The argument that each collective writes: its schema does not say so."""
ASYNCHRONOUS = ("all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "all_reduce")


@dataclass
class Use:
    """An operator's use of a piece of memory: the stream, the operator's number, and what the operator is."""

    stream: int
    number: int
    operator: str


@dataclass
class Memory:
    """A piece of memory. home: the stream that allocated it. written: the last write. read: the reads since, the last
    of every stream. recorded: streams whose work the allocator waits for before it hands the memory to other tensors.
    """

    reference: StorageWeakRef
    home: int
    written: Use | None = None
    read: dict[int, Use] = field(default_factory=dict)
    recorded: set[int] = field(default_factory=set)

    def uses(self) -> list[Use]:
        return [*self.read.values(), *([self.written] if self.written else [])]


class StreamCheck(TorchDispatchMode):
    """Notes operators while active.

    Attributes:
        races: a line for each.
        launches: number of operators on every stream, by the stream's number; MAIN is the first.
    """

    def __init__(self):
        super().__init__()
        self.races: list[str] = []
        self.launches: dict[int, int] = {}
        self.order = StreamSynchronizations()
        self.numbers = iter(range(1, sys.maxsize))
        self.streams = {MAIN: Stream(self, MAIN)}
        self.of_engine: set[int] = set()
        self.memories: dict[int, Memory] = {}
        self.shared: dict[int, Memory] = {}  # memory that another stream than its home uses, too
        self.launched = 0
        self.current = [MAIN]
        self.changes = [(0, MAIN)]  # the sequence number of the next node, and the stream from there on

    def new_stream(self, *_, **__) -> Stream:
        stream = Stream(self, next(self.numbers))
        self.order.create_stream(stream.number)
        self.streams[stream.number] = stream
        return stream

    def current_stream(self, device=None) -> Stream:
        return self.streams[self.current[-1]]

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self._push(stream.number)
        try:
            yield
        finally:
            self._pop()

    def _push(self, number: int) -> None:
        self.current.append(number)
        self.changes.append((torch.autograd._get_sequence_nr(), number))

    def _pop(self) -> None:
        self.current.pop()
        self.changes.append((torch.autograd._get_sequence_nr(), self.current[-1]))

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """In place of ``Tensor.record_stream``."""
        self._memory(tensor).recorded.add(stream.number)

    # Operators

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._note_freed()
        reads, writes = self._arguments(func._schema, args, kwargs)
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if _has_memory(x) and _key(x) not in self.memories]
        self._launch(func._schema.name, reads, writes + made)
        return result

    def _arguments(self, schema, args, kwargs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Two lists: the tensors that an operator reads, and the tensors that the operator changes."""
        if schema.name.startswith("c10d::") and schema.name not in COLLECTIVES:
            raise NotImplementedError(f"the check does not know which arguments {schema.name} writes")
        reads, writes = [], []
        given = zip(schema.arguments, args, strict=False)
        named = ((argument, kwargs[argument.name]) for argument in schema.arguments if argument.name in kwargs)
        for argument, value in (*given, *named):
            alias = argument.alias_info
            written = argument.name == COLLECTIVES.get(schema.name) or (alias is not None and alias.is_write)
            for tensor in filter(_has_memory, tree_leaves(value)):
                self._memory(tensor)
                if written:
                    writes.append(tensor)
                elif alias is None and not METADATA_ONLY.match(schema.name):
                    reads.append(tensor)
        return reads, writes

    def _memory(self, tensor: torch.Tensor) -> Memory:
        """A tensor's memory. Memory that is not seen before is allocated by the current stream."""
        memory = self.memories.get(_key(tensor))
        if memory is None:
            reference = StorageWeakRef(tensor.untyped_storage())
            memory = self.memories[_key(tensor)] = Memory(reference, self.current[-1])
        return memory

    def _launch(self, name, reads, writes) -> None:
        stream = self.current[-1]
        if (
            stream == ENGINE
        ):  # the engine orders this itself: after what it reads, and before the node that takes the sum
            stream = self.new_stream().number
            self.of_engine.add(stream)
        self.launched += 1
        self.launches[stream] = self.launches.get(stream, 0) + 1
        self.order.update_seq_num(stream, self.launched)
        use = Use(stream, self.launched, f"{name.removeprefix('aten::')} {_place()}")
        written = {_key(tensor): tensor for tensor in writes}
        for key, tensor in {_key(tensor): tensor for tensor in reads}.items():
            if key not in written:
                memory = self._memory(tensor)
                self._compare(use, "reads", memory.written, "writes")
                self._note(key, memory, use)
                memory.read[stream] = use
        for key, tensor in written.items():
            memory = self._memory(tensor)
            for before in memory.read.values():
                self._compare(use, "writes", before, "reads")
            self._compare(use, "writes", memory.written, "writes")
            self._note(key, memory, use)
            memory.written, memory.read = use, {}
        if self.launched % 4096 == 0:
            gone = [key for key, memory in self.memories.items() if memory.reference.expired()]
            for key in gone:
                if key not in self.shared:
                    del self.memories[key]

    def _note(self, key: int, memory: Memory, use: Use) -> None:
        if use.stream in self.of_engine:
            memory.recorded.add(use.stream)
        elif use.stream != memory.home:
            self.shared[key] = memory

    def _compare(self, use: Use, does: str, before: Use | None, did: str) -> None:
        if before is None or use.stream in self.of_engine:
            return
        if not self.order.is_ordered_after(use.stream, before.number, before.stream):
            self._report(
                f"{use.operator} on stream {use.stream} {does} what {before.operator} {did} on stream {before.stream}"
            )

    def _note_freed(self) -> None:
        for key in [key for key, memory in self.shared.items() if memory.reference.expired()]:
            memory = self.shared.pop(key)
            del self.memories[key]
            for use in memory.uses():
                ordered = use.stream == memory.home or use.stream in memory.recorded
                if not ordered and not self.order.is_ordered_after(memory.home, use.number, use.stream):
                    self._report(
                        f"memory of stream {memory.home} freed before {_place()} while {use.operator} uses it on "
                        f"stream {use.stream}"
                    )

    def _report(self, race: str) -> None:
        if race not in self.races:
            self.races.append(race)

    # Backward passes

    def backward(self, run: Callable, outputs, *args, **kwargs):
        """Runs autograd's engine, whose nodes go to their streams."""
        caller, producers = self.current_stream(), _producers(outputs)
        begin, ends = caller.record_event(), {}
        handles = []
        for node in producers:
            handles.append(node.register_prehook(partial(self._enter, node, producers[node], begin, ends)))
            handles.append(node.register_hook(partial(self._leave, node, ends)))
        self._push(ENGINE)
        try:
            result = run(outputs, *args, **kwargs)
        finally:
            self._pop()
            for handle in handles:
                handle.remove()
        for node, before in producers.items():  # the caller waits for the nodes that end the graph
            last = [node] if node in ends and not node.next_functions else before if node not in ends else []
            for end in last:
                if end in ends:
                    caller.wait_event(ends[end])
        self._take(caller, tree_leaves(result))
        return result

    def _enter(self, node, producers, begin, ends, gradients) -> None:
        stream = self.streams[self._stream_of(node)]
        stream.wait_event(begin)
        for producer in producers:
            if producer in ends:
                stream.wait_event(ends[producer])
        self._take(stream, gradients)
        self._push(stream.number)

    def _leave(self, node, ends, *_) -> None:
        ends[node] = self.current_stream().record_event()
        self._pop()

    def _take(self, stream: Stream, gradients) -> None:
        for gradient in filter(_has_memory, gradients):
            memory = self._memory(gradient)
            if memory.written is not None and memory.written.stream in self.of_engine:
                stream.wait_event(self.streams[memory.written.stream].record_event())
            memory.recorded.add(stream.number)

    def _stream_of(self, node) -> int:
        number = node._sequence_nr()
        if number >= torch.autograd._get_sequence_nr():  # a node that adds to a parameter's gradient has no number
            return MAIN
        return self.changes[bisect_right(self.changes, number, key=lambda change: change[0]) - 1][1]

    # Collectives

    def asynchronous(self, collective: Callable) -> Callable:
        """The collective, on a stream of its own where asynchronous."""
        signature = inspect.signature(collective)

        def call(*args, **kwargs):
            given = signature.bind(*args, **kwargs).arguments
            if not given.get("async_op"):
                return collective(*args, **kwargs)
            stream = self.new_stream()
            stream.wait_stream(self.current_stream())
            with self.on(stream):
                work = collective(*args, **kwargs)
            return Work(work, stream, [x for x in tree_leaves(given) if isinstance(x, torch.Tensor)])

        return call


def _has_memory(x) -> bool:
    return isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() > 0


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place() -> str:
    """The line of the layers that is at work."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if ("/linear_moe/" in name or "/mom_layers/" in name) and "/tests/" not in name:
            return f"({'/'.join(name.split('/')[-2:])}:{frame.f_lineno})"
        frame = frame.f_back
    return "(outside the layers)"


def _producers(outputs) -> dict:
    """Every node of a graph, with the nodes whose gradients it takes."""
    found = {tensor.grad_fn: [] for tensor in outputs if tensor.grad_fn is not None}
    left = list(found)
    while left:
        node = left.pop()
        for following, _ in node.next_functions:
            if following is not None:
                if following not in found:
                    found[following] = []
                    left.append(following)
                found[following].append(node)
    return found


@contextmanager
def checked_streams() -> Iterator[StreamCheck]:
    """Checks what runs inside."""
    from linear_moe.parallel import sequence_counts, streams

    check = StreamCheck()
    fork, apart = streams.SecondStream.__init__, sequence_counts._apart
    run = torch.autograd._engine_run_backward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", check.new_stream)
        patch.setattr(torch.cuda, "Event", lambda *_, **__: Event(check))
        patch.setattr(torch.cuda, "stream", check.on)
        patch.setattr(torch.cuda, "current_stream", check.current_stream)
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: check.record(tensor, stream))
        patch.setattr(torch.autograd, "_engine_run_backward", partial(check.backward, run))
        for name in ASYNCHRONOUS:
            patch.setattr(torch.distributed, name, check.asynchronous(getattr(torch.distributed, name)))
        patch.setattr(streams, "_streams", {})
        patch.setattr(streams.SecondStream, "__init__", lambda self, device: fork(self, DEVICE))
        patch.setattr(sequence_counts, "_streams", {})
        patch.setattr(sequence_counts, "_apart", lambda device: apart(DEVICE))
        with check:
            yield check
