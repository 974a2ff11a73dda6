"""The few changes to Megatron that have no hook. `patches()` lists them, each with its reason."""

from megatron_patches.patch import Patch, PatchError, applied

__all__ = ["Patch", "PatchError", "applied", "patches"]


def patches() -> tuple[Patch, ...]:
    """Every patch of this package, applied or not: what is changed, why, and what would make it unnecessary."""
    from megatron_patches import checkpoints, cpu, dataset_helpers, reshardable_optimizer  # these import torch

    return (dataset_helpers.PATCH, reshardable_optimizer.PATCH, *checkpoints.patches(), *cpu.PATCHES)
