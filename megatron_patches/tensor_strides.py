"""Reads checkpoints that PyTorch 2.15 and later have written.

PyTorch 2.15 writes the strides of a tensor beside its type. Megatron gives all that it reads about a tensor to
`torch.empty`, which takes no strides.
"""

import copy
import dataclasses
from pathlib import Path

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_patches.patch import Patch, wrap


def _without_strides(entry):
    if not isinstance(entry, TensorStorageMetadata) or "strides" not in vars(entry.properties):
        return entry
    properties = copy.copy(entry.properties)
    vars(properties).pop("strides", None)  # the class has None
    return dataclasses.replace(entry, properties=properties)


def _load_without_strides(load, strategy, checkpoint_dir, metadata=None):
    from megatron.core.dist_checkpointing.strategies.torch import _get_filesystem_reader

    if metadata is None:
        metadata = _get_filesystem_reader(Path(checkpoint_dir)).read_metadata()
    entries = {key: _without_strides(entry) for key, entry in metadata.state_dict_metadata.items()}
    return load(strategy, checkpoint_dir, dataclasses.replace(metadata, state_dict_metadata=entries))


PATCH = Patch(
    name="tensor-strides",
    reason="Megatron cannot load a checkpoint in which PyTorch 2.15 wrote the strides of tensors",
    removed_when="load_tensors_metadata takes from a tensor's properties what torch.empty takes",
    targets=(
        wrap(
            "megatron.core.dist_checkpointing.strategies.torch",
            "TorchDistLoadShardedStrategy.load_tensors_metadata",
            _load_without_strides,
        ),
    ),
)
