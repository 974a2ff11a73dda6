"""The few changes to Megatron that have no hook. `patches()` lists them, each with its reason."""

from megatron_patches.patch import Patch, PatchError, applied

__all__ = ["Patch", "PatchError", "applied", "patches"]


def patches() -> tuple[Patch, ...]:
    """Every patch of this package, applied or not, each once: what it changes, why, and when it can go."""
    # These modules import torch, which a process that only imports the package may do without.
    from megatron_patches import (
        bucket_types,
        checkpoints,
        coalesced_types,
        cpu,
        dataset_helpers,
        early_gather,
        first_checkpoint,
        float16_optimizer,
        float32_parameters,
        gradient_norm,
        latent_attention,
        layer_wise_optimizer,
        optimizer_shards,
        parameter_groups,
        recomputed_regions,
        reshardable_optimizer,
        tensor_strides,
        torch_fsdp2,
        torch_norm,
        trusted_checkpoints,
    )

    ours = (
        dataset_helpers.PATCH, float32_parameters.PATCH, float16_optimizer.PATCH, layer_wise_optimizer.PATCH,
        parameter_groups.PATCH, bucket_types.PATCH, early_gather.PATCH, reshardable_optimizer.PATCH, torch_fsdp2.PATCH,
        optimizer_shards.PATCH, coalesced_types.PATCH, torch_norm.PATCH, latent_attention.PATCH,
        tensor_strides.PATCH, gradient_norm.PATCH, recomputed_regions.PATCH, trusted_checkpoints.PATCH,
        *checkpoints.patches(), first_checkpoint.PATCH, *cpu.PATCHES,
    )  # fmt: skip
    return tuple({patch.name: patch for patch in ours}.values())
