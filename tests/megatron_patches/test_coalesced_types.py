"""Coalesced collectives of tensors of two types give what the collectives give one by one."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager

from megatron_patches.coalesced_types import _each_type


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("async_ops", [False, True])
def test_gathers_and_sums_of_two_types(group, async_ops):
    sent = [torch.arange(4.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    received = [torch.zeros_like(tensor) for tensor in sent]
    with _each_type(_coalescing_manager, group, async_ops=async_ops) as works:
        for output, tensor in zip(received, sent, strict=True):
            dist.all_gather_into_tensor(output, tensor, group=group)
    works.wait()
    assert all(output.equal(tensor) for output, tensor in zip(received, sent, strict=True))
    with _each_type(_coalescing_manager, group, async_ops=async_ops) as works:
        for tensor in sent:
            dist.all_reduce(tensor, group=group)
    works.wait()
    assert all(tensor.tolist() == [0, 1, 2, 3] for tensor in sent)


def test_nothing_to_send(group):
    with _each_type(_coalescing_manager, group):
        pass
