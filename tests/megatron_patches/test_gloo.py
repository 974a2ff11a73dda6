"""Gloo's collectives with parts of different lengths, in three processes, beside what the parts are."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from megatron_patches import gloo

RANKS, WIDTH = 3, 4


def part_of(rank: int, lengths: list[int]) -> torch.Tensor:
    return torch.arange(lengths[rank] * WIDTH, dtype=torch.float32).view(-1, WIDTH) + 100 * rank


def exchange(rank: int, store: str, lengths: list[int]) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    parts = [part_of(other, lengths) for other in range(RANKS)]
    gathered = [torch.empty_like(part) for part in parts]
    gloo.gather_different_lengths(torch.distributed.all_gather, gathered, parts[rank])
    for found, part in zip(gathered, parts, strict=True):
        assert torch.equal(found, part)
    # Every rank gives each part, plus its own rank: the sum of a part is three of it and 0 + 1 + 2.
    own = torch.empty_like(parts[rank])
    handle = gloo.scatter_different_lengths(
        torch.distributed.reduce_scatter, own, [part + rank for part in parts], async_op=True
    )
    handle.wait()
    assert torch.equal(own, RANKS * parts[rank] + sum(range(RANKS)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lengths", [[5, 2, 3], [4, 0, 1], [2, 2, 2]], ids=["ragged", "one-empty", "equal"])
def test_parts_of_any_length_arrive_whole(lengths, tmp_path):
    torch.multiprocessing.spawn(exchange, (str(tmp_path / "store"), lengths), nprocs=RANKS)
