"""The Triton routing plan against the PyTorch one: integers, so equal or wrong."""

import pytest
import torch
from comparison import DEVICE

from mom_layers.route.plan import build_routing_plan
from mom_layers.route.reference import routing_plan_reference

NAMES = ("token_of_row", "row_of_choice", "segment_of_row", "position_of_row", "cu_seqlens", "memory_offsets")
RAGGED = [0, 1, 2, 3, 63, 64, 65, 0]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Fresh memory holds a number that no plan holds, so that the test sees an element that no kernel wrote."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        return empty(*args, **kwargs).fill_(-(2**31))

    monkeypatch.setattr(torch, "empty", poisoned)


def offsets(lengths):
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def random_ids(tokens, num_memories, topk, seed=0):
    scores = torch.rand(tokens, num_memories, generator=torch.Generator().manual_seed(seed))
    return scores.topk(topk, dim=-1).indices.to(DEVICE)


def check(ids, lengths, num_memories, shared, mask=None):
    options = dict(num_memories=num_memories, shared=shared, token_mask=mask)
    got, expected = (build_routing_plan(ids, offsets(lengths), kernels=k, **options) for k in ("triton", "torch"))
    for name in NAMES:
        a, b = getattr(got, name), getattr(expected, name)
        assert a.dtype == b.dtype == torch.int32 and a.shape == b.shape, name
        assert torch.equal(a, b), name
    if mask is None:
        token_of_row, cu_seqlens = routing_plan_reference(ids, offsets(lengths), num_memories, shared)
        assert got.token_of_row.tolist() == token_of_row and got.cu_seqlens.tolist() == cu_seqlens


@pytest.mark.parametrize(
    "num_memories, topk, masked, shared",
    [(4, 2, False, True), (4, 2, True, True), (4, 2, False, False), (17, 3, True, False), (5, 5, True, True)],
)
def test_equals_torch_on_ragged_sequences(num_memories, topk, masked, shared):
    tokens = sum(RAGGED)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.7 if masked else None
    check(random_ids(tokens, num_memories, topk), RAGGED, num_memories, shared, mask)


@pytest.mark.parametrize("lengths", [[1], [128], [129, 127], [256, 0, 1], [0, 0], [0]])
@pytest.mark.parametrize("masked", [False, True])
def test_block_edges_and_no_tokens(lengths, masked):
    tokens = sum(lengths)
    mask = torch.arange(tokens, device=DEVICE) % 3 > 0 if masked else None
    check(random_ids(tokens, 4, 2), lengths, 4, True, mask)


def test_many_sequences():
    lengths = [i % 4 for i in range(19)]
    check(random_ids(sum(lengths), 3, 1), lengths, 3, True)


def test_more_memories_than_a_block_has_tokens():
    check(random_ids(70, 200, 4), [33, 37], 200, True)


@pytest.mark.parametrize("shared", [True, False])
def test_a_memory_that_no_token_chooses_and_one_that_every_token_chooses(shared):
    ids = random_ids(sum(RAGGED), 2, 1)[:, 0] + 2  # 2 or 3: no token chooses memory 0, every token memory 1
    check(torch.stack([ids, torch.ones_like(ids)], dim=1), RAGGED, 4, shared)


@pytest.mark.parametrize("value", [True, False])
def test_masks_of_one_value(value):
    mask = torch.full((sum(RAGGED),), value, device=DEVICE)
    check(random_ids(sum(RAGGED), 4, 2), RAGGED, 4, True, mask)


def test_strided_and_int32_ids():
    ids = random_ids(70, 4, 4)
    check(ids[:, ::2], [33, 37], 4, True)
    check(ids.int().t().contiguous().t()[:, 1:3], [33, 37], 4, False)


def test_numbers_of_sequences_and_memories():
    plan = build_routing_plan(random_ids(8, 4, 2), offsets([3, 5]), num_memories=4, kernels="triton")
    assert (plan.num_rows, plan.num_sequences, plan.num_all_memories, plan.num_segments) == (24, 2, 5, 10)
    masked = build_routing_plan(
        random_ids(8, 4, 2), offsets([3, 5]), num_memories=4, shared=False, kernels="triton",
        token_mask=torch.ones(8, dtype=torch.bool, device=DEVICE),
    )  # fmt: skip
    assert (masked.num_rows, masked.num_all_memories, masked.num_segments) == (16, 4, 9)


def test_bad_inputs_are_refused():
    good = dict(memory_ids=random_ids(8, 4, 2), token_cu_seqlens=offsets([8]), num_memories=4)
    mask = torch.ones(7, dtype=torch.bool, device=DEVICE)
    too_many = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE).expand(2**30, 2)
    cases = [
        (
            r"memory_ids must be a tensor of int32 or int64, got torch.float32",
            dict(memory_ids=good["memory_ids"].float()),
        ),
        (r"k from 1 to num_memories \(1\), got k = 2", dict(num_memories=1)),
        (r"int32 \[B \+ 1\] with B >= 1, got torch.int64 \[2\]", dict(token_cu_seqlens=offsets([8]).long())),
        (r"with B >= 1, got torch.int32 \[1\]", dict(token_cu_seqlens=offsets([]).int())),
        (r"token_mask must be bool \[8\], got torch.bool \[7\]", dict(token_mask=mask)),
        ("at most 1022 for kernels='triton', got 5000", dict(num_memories=5000)),
        (
            r"fewer than 2\^31 rows, got 3221225472",
            dict(memory_ids=too_many),
        ),
        ("kernels must be one of 'auto', 'torch', 'triton', got 'cuda'", dict(kernels="cuda")),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            build_routing_plan(**({"kernels": "triton"} | good | change))


@pytest.mark.parametrize("shared", [True, False])
def test_time_major_rows_read_the_same_tokens(shared):
    sequences, length = 3, 7
    tokens = torch.randn(sequences * length, 5, device=DEVICE)
    by_time = tokens.unflatten(0, (sequences, length)).transpose(0, 1).flatten(0, 1)
    plan = build_routing_plan(
        random_ids(sequences * length, 4, 2), offsets([length] * sequences), num_memories=4, shared=shared
    )
    other = plan.time_major()
    assert torch.equal(by_time[other.token_of_row], tokens[plan.token_of_row])
    row_of_choice = plan.row_of_choice.unflatten(0, (sequences, length)).transpose(0, 1).flatten(0, 1)
    assert torch.equal(other.row_of_choice, row_of_choice)
    assert other.token_of_row.dtype == other.row_of_choice.dtype == torch.int32
    assert torch.equal(other.cu_seqlens, plan.cu_seqlens)
