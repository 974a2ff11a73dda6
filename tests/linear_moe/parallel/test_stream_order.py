"""No races between streams in context and expert parallelism; and the check that says so finds races."""

import os
import traceback
from contextlib import contextmanager
from dataclasses import replace

import pytest
import stream_check
import torch
import warm_python
from split_layer import HIDDEN, Layer
from stream_check import StreamCheck, checked_streams

# Slices of sequences, with the names of test_context_parallel: documents, rule, kind.
SLICES = [
    ("two sequences", "gated_deltanet", "own projections"),
    ("two sequences", "gated_deltanet", "recomputed"),
    ("two sequences", "gated_deltanet", "states kept"),
    ("two sequences", "gated_deltanet", "in three parts"),
    ("two sequences", "gated_deltanet", "in three parts, states kept"),
    ("two sequences", "gla", "in three parts"),  # whose transitions are diagonal
    ("a document over all ranks, empty ones", "gated_deltanet", "own projections"),
    ("a document over all ranks, empty ones", "gated_deltanet", "states kept"),
]
NOT_LINEAR = ("two sequences", "normalised", "in three parts")  # the backward pass reads states again
# Memories over ranks: the exchange, the kind of split_layer, whether sequences are cut too, whether recomputed.
EXCHANGES = [
    (exchange, kind, cut, recomputed)
    for exchange in ("all-to-all", "all-gather", "peer-memory")
    for kind, cut, recomputed in (
        ("ragged", False, False), ("regular", False, False), ("regular", False, True), ("regular", True, False),
        ("regular", True, True),
    )
]  # fmt: skip
# Ways to take order away, and a case for each that has a race then.
CUT = ("two sequences", "gated_deltanet", "in three parts")
MUTANTS = [
    ("the second stream does not wait", CUT, "on stream 1 reads what"),
    ("the second stream does not wait", ("all-gather", "ragged", False, False), "on stream 1 reads what"),
    ("the current stream does not wait", CUT, "on stream 0 reads what"),
    ("the current stream does not wait", ("all-to-all", "ragged", False, False), "on stream 0 reads what"),
    ("no stream is recorded", CUT, "memory of stream 1 freed"),
    ("nothing is lent", ("all-gather", "ragged", False, False), "memory of stream 0 freed"),
]


@contextmanager
def mutated(mutant):
    from linear_moe.parallel.streams import SecondStream

    with pytest.MonkeyPatch.context() as patch:
        wait = stream_check.Stream.wait_stream
        if mutant == "nothing is lent":
            patch.setattr(SecondStream, "lend", lambda self, x: x)
        elif mutant == "no stream is recorded":
            patch.setattr(StreamCheck, "record", lambda *_: None)
        elif mutant:
            deaf = mutant == "the current stream does not wait"
            patch.setattr(
                stream_check.Stream,
                "wait_stream",
                lambda self, other: None if (self.number == stream_check.MAIN) == deaf else wait(self, other),
            )
        yield


def slices(rank, *case):
    """One layer over a slice of a sequence, forward and backward."""
    from test_context_parallel import work

    with checked_streams() as check:
        work(rank, *case)
    return check


def pull_over_gloo(group):
    """A pull for :mod:`linear_moe.parallel.peer_memory` where no rank can read another's memory."""
    from linear_moe.parallel.collectives import gather

    def pull(buffer, tensors, wanted):
        buffer.rows.copy_(torch.cat(tensors, dim=1))
        rows = gather(buffer.rows, group)
        chosen = rows.index_select(0, wanted.clamp(min=0).flatten()).unflatten(0, wanted.shape)
        found = torch.where((wanted >= 0)[..., None], chosen, 0).sum(1)
        return list(found.split([tensor.shape[1] for tensor in tensors], dim=1))

    return pull


def exchange_of_rows(rank, exchange, kind, cut, recomputed):
    """Two layers, one after the other, whose memories are split over the ranks, forward and backward."""
    from megatron.core.tensor_parallel import checkpoint

    from linear_moe.parallel import peer_memory
    from linear_moe.parallel.context import ContextSlice
    from linear_moe.parallel.expert import mix_memories_over_ranks

    group = torch.distributed.group.WORLD
    layer = Layer(group.size(), exchange, kind=kind)
    data = layer.inputs(rank)
    assert data.gate.shape[1] == HIDDEN  # so that a layer's outputs are the next layer's tokens
    here = None
    choices = layer.choices(data, group)
    if cut:
        here = ContextSlice(group, data.x.shape[0] // (len(data.borders) - 1))
        here._num_parts, here._is_small = lambda *about: 2, lambda *about: True
        choices = replace(choices, context_size=group.size())

    def run(x, q, gate, mix):
        return mix_memories_over_ranks(
            x, q, gate, mix, choices, layer.routed(rank), layer.shared_parameters(), exchange=exchange,
            sequence_slice=here,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch, checked_streams() as check:
        patch.setattr(peer_memory, "pull", pull_over_gloo(group))
        patch.setattr(
            peer_memory,
            "symmetric_buffer",
            lambda kind, rows, channels, dtype, device, group: peer_memory.PeerBuffer(
                torch.empty(rows, channels, dtype=dtype), None, None
            ),
        )
        x = data.x
        for _ in range(2):
            x = (
                checkpoint(run, False, x, data.q, data.gate, data.mix)
                if recomputed
                else run(x, data.q, data.gate, data.mix)
            )
        x.square().sum().backward()
    return check


def asynchronous(waits):
    """A collective beside an operator that reads its result, with a wait between the two and without."""
    group = torch.distributed.group.WORLD
    with checked_streams() as check:
        x = torch.ones(2)
        gathered = torch.empty(2 * group.size())
        work = torch.distributed.all_gather_into_tensor(gathered, x, group=group, async_op=True)
        if waits:
            work.wait()
        gathered.sum()
        work.wait()
    return check


def on_rank(rank, place, sender, cases):
    from linear_moe.parallel import context
    from megatron_patches import cpu, recomputed_regions

    context.CHUNK = 2  # parts are cut between chunks, and these slices are shorter than one
    cpu.apply()
    recomputed_regions.PATCH.apply()
    torch.set_num_threads(1)
    os.environ |= place
    torch.distributed.init_process_group("gloo")
    try:
        for mutant, case in cases:
            with mutated(mutant):
                check = {3: slices, 4: exchange_of_rows}[len(case)](rank, *case)
            beside = sum(check.launches.get(number, 0) for number in check.streams if number not in check.of_engine)
            sender.send((check.races, beside - check.launches[stream_check.MAIN]))
        sender.send([asynchronous(waits).races for waits in (False, True)])
    except BaseException:
        sender.send(traceback.format_exc())
        raise


def races(size, cases):
    """Of every case (mutant, case), the races and the number of operators beside the main stream, rank by rank; and
    under "asynchronous" the races of a collective without a wait and with a wait."""
    return warm_python.answers_of_ranks(on_rank, size, (cases,), (*cases, "asynchronous"), 120)


@pytest.fixture(scope="module")
def two_ranks():
    cases = [("", case) for case in (*SLICES, NOT_LINEAR, *EXCHANGES)]
    return races(2, [*cases, *((mutant, case) for mutant, case, _ in MUTANTS)])


@pytest.fixture(scope="module")
def three_ranks():
    return races(3, [("", case) for case in SLICES])


@pytest.mark.parametrize("case", [*SLICES, NOT_LINEAR, *EXCHANGES], ids=str)
def test_two_ranks_have_no_races(two_ranks, case):
    for found, beside in two_ranks["", case]:
        assert not found
        # Two ranks exchange no transition, and only parts need some.
        assert (beside > 0) == ("parts" in case[2] if len(case) == 3 else True)


@pytest.mark.parametrize("case", SLICES, ids=str)
def test_three_ranks_have_no_races(three_ranks, case):
    for rank, (found, beside) in enumerate(three_ranks["", case]):
        assert not found
        assert (beside > 0) == ("parts" in case[2] or rank == 1)


@pytest.mark.parametrize("mutant,case,race", MUTANTS, ids=str)
def test_a_race_is_found_where_order_is_taken_away(two_ranks, mutant, case, race):
    for found, _ in two_ranks[mutant, case]:
        assert any(race in line for line in found)


def test_an_asynchronous_collective_is_waited_for(two_ranks):
    for without, waited in two_ranks["asynchronous"]:
        assert len(without) == 1 and "sum" in without[0] and "writes" in without[0]
        assert not waited


@contextmanager
def fork():
    """A check, a tensor x of the main stream, and a second stream that has waited for x."""
    with checked_streams() as check:
        x = torch.ones(4)
        second = torch.cuda.Stream()
        second.wait_stream(torch.cuda.current_stream())
        yield check, x, second


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(
    "before,after",
    [
        (lambda x: x.add_(1), lambda x: x + 1),
        (lambda x: x + 1, lambda x: x.add_(1)),
        (lambda x: x.add_(1), lambda x: x.zero_()),
    ],
    ids=["write, read", "read, write", "write, write"],
)
def test_unordered_uses_are_races(before, after, waits):
    with fork() as (check, x, second):
        with torch.cuda.stream(second):
            before(x)
        if waits:
            torch.cuda.current_stream().wait_stream(second)
        after(x)
    assert len(check.races) == (not waits)


def test_reads_on_two_streams_are_no_race():
    with fork() as (check, x, second):
        with torch.cuda.stream(second):
            x + 1
        x + 1
    assert not check.races


def test_events_order_what_is_before_them():
    with fork() as (check, x, second):
        y = torch.ones(4)
        second.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(second):
            x.add_(1)
            event = torch.cuda.Event()
            event.record()
        torch.cuda.current_stream().wait_event(event)
        with torch.cuda.stream(second):
            y.add_(1)
        x.add_(1)
        assert not check.races
        y.add_(1)
    assert len(check.races) == 1


@pytest.mark.parametrize("way", ["", "recorded", "waited", "freed later"])
def test_memory_is_freed_after_its_uses(way):
    with fork() as (check, _, second):
        x = torch.ones(4)
        second.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(second):
            y = x * 2
        if way == "recorded":
            x.record_stream(second)
        if way == "waited":
            torch.cuda.current_stream().wait_stream(second)
        if way != "freed later":
            del x
        torch.ones(4)
        torch.cuda.current_stream().wait_stream(second)
        y.record_stream(torch.cuda.current_stream())
    assert [line for line in check.races if "freed" in line] == check.races and len(check.races) == (way == "")


@pytest.mark.parametrize("lent", [False, True])
def test_saved_tensors_are_freed_after_a_backward_pass_has_read_them(lent):
    """The product keeps y, of the main stream, and reads y on the second stream in the backward pass."""
    from linear_moe.parallel.streams import SecondStream

    with checked_streams() as check:
        x = torch.ones(4, requires_grad=True)
        y = x * 2
        second = SecondStream(x.device)
        if lent:
            y = second.lend(y)
        with second.beside():
            z = (y * 1) * y
        second.join(z)
        del y
        z.sum().backward()
    assert len(check.races) == (not lent)
    assert x.grad.tolist() == [8] * 4
