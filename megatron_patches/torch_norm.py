"""Lets Megatron's PyTorch norms train with sequence parallelism.

A norm sees the tokens of its rank only, so every rank has a part of the gradient of the norm's parameters. Megatron
sums these parts for parameters with a mark, which Transformer Engine's norms set.
"""

import copy

from megatron_patches.patch import Patch, wrap


def _marked(build, cls, config, *args, **kwargs):
    if not config.sequence_parallel:
        return build(cls, config, *args, **kwargs)
    without = copy.copy(config)
    without.sequence_parallel = False
    norm = build(cls, without, *args, **kwargs)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True
    return norm


PATCH = Patch(
    name="torch-norm",
    reason="WrappedTorchNorm refuses sequence parallelism, as in the layers of multi-token prediction",
    removed_when="WrappedTorchNorm marks its parameters as sequence parallel",
    targets=(wrap("megatron.core.transformer.torch_norm", "WrappedTorchNorm.__new__", _marked),),
)
