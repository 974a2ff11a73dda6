"""Computes the norm of the gradients, and scales the gradients, in Transformer Engine's kernels for many tensors.

Megatron takes these kernels only together with `multi_tensor_scale_tensor`. Transformer Engine 2.11 does not have that
kernel, and Megatron then starts a kernel and waits for the GPU once for every parameter of the model. A model with
thousands of experts has thousands of parameters. Without `multi_tensor_scale_tensor` Megatron reads the norm on the
host, as it does with Apex.
"""

import importlib

from megatron_patches.patch import Patch
from megatron_patches.target import Target

MODULE = "megatron.core.optimizer.clip_grads"
KERNELS = {
    "multi_tensor_applier": "multi_tensor_applier",
    "l2_norm_impl": "multi_tensor_l2norm",
    "multi_tensor_scale_impl": "multi_tensor_scale",
}
"""Names in Megatron's module, each with the name in Transformer Engine."""


def _chosen(name: str):
    """Builds the replacement: Transformer Engine's kernel where Megatron has passed all of the kernels over."""

    def build(original):
        try:
            found = importlib.import_module("transformer_engine.pytorch.optimizers")
        except ImportError:
            return original
        if hasattr(found, "multi_tensor_scale_tensor") or not all(hasattr(found, here) for here in KERNELS.values()):
            return original
        return getattr(found, KERNELS[name])

    return build


PATCH = Patch(
    name="gradient-norm",
    reason="the norm of the gradients waits for the GPU at every parameter where Transformer Engine lacks a kernel",
    removed_when="clip_grads imports multi_tensor_scale_tensor apart from the other kernels",
    targets=tuple(Target(MODULE, name, _chosen(name)) for name in KERNELS),
)
