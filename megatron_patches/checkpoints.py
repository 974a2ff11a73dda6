"""The patches without which work can be lost: a checkpoint is written whole or not at all, and a failure is told."""

from megatron_patches import checkpoint_errors, checkpoint_tracker, checkpoint_writer, stop_signal
from megatron_patches.patch import Patch


def patches() -> tuple[Patch, ...]:
    """To be called when megatron.core may be imported."""
    return (
        checkpoint_tracker.patch(),
        checkpoint_writer.SOCKETS,
        checkpoint_writer.FILES,
        checkpoint_writer.PATCH,
        checkpoint_errors.PATCH,
        stop_signal.PATCH,
    )
