"""Sends tensors of several types in collectives of their own, where Megatron coalesces the collectives into one.

Megatron FSDP sends all buckets of a layer in one coalesced collective. A layer with float32 parameters among 16-bit
ones has buckets of two types. A coalesced reduction takes the operation of its first bucket for all: bf16 gradients are
scaled before a sum, float32 gradients by the sum, so that one of the two would be scaled twice or not at all. A
coalesced all-reduce takes one type, over NCCL and over gloo, and gloo's coalesced gather garbles the second type.
"""

from contextlib import contextmanager

from torch.distributed import distributed_c10d

from megatron_patches.patch import Patch, wrap


@contextmanager
def _each_type(coalesce, group=None, device=None, async_ops=False):
    group = group or distributed_c10d._get_default_group()
    with coalesce(group, device, async_ops) as works:
        yield works
        waiting = distributed_c10d._world.pg_coalesce_state[group]
        kept = [operation for operation in waiting if operation.tensor.dtype == waiting[0].tensor.dtype]
        later = [operation for operation in waiting if operation.tensor.dtype != waiting[0].tensor.dtype]
        waiting[:] = kept
    if later:
        with _each_type(coalesce, group, device, async_ops) as more:
            distributed_c10d._world.pg_coalesce_state[group].extend(later)
        works.works.extend(more.works)


PATCH = Patch(
    name="coalesced-types",
    reason="Megatron FSDP sends buckets of several types in one coalesced collective, which has one type and one scale",
    removed_when="Megatron FSDP coalesces the collectives of each type apart",
    targets=(
        wrap(
            "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer", "_coalescing_manager", _each_type
        ),
    ),
)
