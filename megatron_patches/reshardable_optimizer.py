"""Lets the distributed optimizer save its state in the fully reshardable format when it has several buckets.

Megatron gathers the state without the padding between buckets, and then cuts the state at offsets that count the
padding. Every parameter after a padded bucket is then saved from a shifted offset, its float32 value included. Small
parameters, such as the decay rates of a recurrence, make padded buckets.
"""

from contextlib import ExitStack, contextmanager

from megatron_patches.patch import Patch, wrap


@contextmanager
def _counted_with_padding(holder, numel: int):
    """Sets `numel_unpadded` of a buffer or bucket to its whole length for a while."""
    unpadded = holder.numel_unpadded
    holder.numel_unpadded = numel
    try:
        yield
    finally:
        holder.numel_unpadded = unpadded


def _keep_padding(build, optimizer, *args, **kwargs):
    with ExitStack() as stack:
        for buffer in optimizer.buffers:
            stack.enter_context(_counted_with_padding(buffer, buffer.numel))
            for bucket in buffer.buckets:
                stack.enter_context(_counted_with_padding(bucket, bucket.grad_data.numel()))
        return build(optimizer, *args, **kwargs)


PATCH = Patch(
    name="reshardable-optimizer",
    reason="with several buckets --dist-ckpt-optim-fully-reshardable saves another parameter's state",
    removed_when="sharded_param_state_fully_reshardable cuts at offsets without the padding",
    targets=(
        wrap(
            "megatron.core.optimizer.distrib_optimizer",
            "DistributedOptimizer.sharded_param_state_fully_reshardable",
            _keep_padding,
        ),
    ),
)
