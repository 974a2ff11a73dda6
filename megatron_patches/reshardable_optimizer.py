"""Lets the distributed optimizer save its state in the fully reshardable format when it has several buckets.

It gathers the state without the padding between buckets, and then cuts it by places that count that padding: every
parameter after a bucket whose length is no round number is saved from a shifted place, its float32 value included.
Small parameters, such as the decay rates of a recurrence, make such buckets.
"""

from contextlib import ExitStack, contextmanager

from megatron_patches.patch import Patch, wrap


@contextmanager
def _counted_with_padding(holder, numel: int):
    """The buffer or bucket says that no element of it is padding."""
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
    removed_when="sharded_param_state_fully_reshardable cuts by places that leave the padding out",
    targets=(
        wrap(
            "megatron.core.optimizer.distrib_optimizer",
            "DistributedOptimizer.sharded_param_state_fully_reshardable",
            _keep_padding,
        ),
    ),
)


def apply() -> None:
    """Makes the fully reshardable format right for buckets of any length."""
    PATCH.apply()


def undo() -> None:
    PATCH.undo()
