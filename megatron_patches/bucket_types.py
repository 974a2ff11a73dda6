"""Gives every collective of data parallelism buckets of one type.

A rank with several virtual pipeline stages has, for each stage but the first, one group of all the stage's buckets,
which one coalesced collective sends. In a model with float32 parameters among 16-bit ones these buckets have two types.
gloo gathers both as one type, and the gathered parameters are garbage. gloo's all-reduce of bf16 and float32 gradients
(`--grad-reduce-in-bf16`) raises an error, and so does NCCL's. NCCL gathers and scatters each bucket in its own type.
"""

import torch

from megatron_patches.patch import Patch, wrap


def _types(buffer):
    """What buffers must agree on to be sent together: the type of the gradients, over gloo the parameters' too."""
    over_gloo = torch.distributed.get_backend(buffer.data_parallel_group) == "gloo"
    return buffer.grad_dtype, buffer.param_dtype if over_gloo else None


def _group_each_type(partition, buffers, force_single_bucket_group=False, *args, **kwargs):
    if not force_single_bucket_group:  # a group has one bucket, or one with 8-bit parameters and those beside it
        return partition(buffers, force_single_bucket_group, *args, **kwargs)
    alike = {}
    for buffer in buffers:
        alike.setdefault(_types(buffer), []).append(buffer)
    return [group for same in alike.values() for group in partition(same, force_single_bucket_group, *args, **kwargs)]


PATCH = Patch(
    name="bucket-types",
    reason="virtual pipeline stages send buckets of several types in one collective, which garbles parameters over "
    "gloo and fails in all-reduces",
    removed_when="partition_buckets makes a group for each type",
    targets=(wrap("megatron.core.distributed.param_and_grad_buffer", "partition_buckets", _group_each_type),),
)
