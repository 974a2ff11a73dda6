"""Lets Megatron's gated delta net train on a machine without a GPU, and without flash-linear-attention.

The layer has a path in PyTorch, of --deterministic-mode. That path takes from flash-linear-attention, which runs on
GPUs, the norm of queries and keys alone.
"""

import copy

import torch

from megatron_patches.patch import Patch, replace, wrap


def l2norm(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """x [..., D] over its length along the last dimension, with eps added to the squared length."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _in_pytorch(build, layer, config, *args, **keywords):
    config = copy.copy(config)
    config.deterministic_mode = True
    build(layer, config, *args, **keywords)


_LAYER = "megatron.core.ssm.gated_delta_net.common"
PATCH = Patch(
    name="cpu-gated-delta-net",
    reason="Megatron's gated delta net refuses to start without flash-linear-attention, whose kernels need a GPU",
    removed_when="GatedDeltaNet's path in PyTorch imports nothing of flash-linear-attention",
    targets=(
        replace(_LAYER, "HAVE_FLA", True),
        replace(_LAYER, "l2norm", l2norm),
        wrap(_LAYER, "_GDNBase.__init__", _in_pytorch),
    ),
)
