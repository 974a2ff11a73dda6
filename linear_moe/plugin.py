"""The door for programs that put Mixture-of-Memories into Megatron, or take Mixture-of-Memories out again."""

from linear_moe.entry.model_patches import install, patches, uninstall

__all__ = ["install", "patches", "uninstall"]
