"""A checkpoint whose metadata has the strides of tensors loads, whichever PyTorch reads it."""

import dataclasses

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_patches.tensor_strides import _load_without_strides


def test_strides_are_left_out_and_the_metadata_stays_as_it_is():
    properties = TensorProperties(dtype=torch.bfloat16)
    vars(properties)["strides"] = (2, 1)
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([3, 2]))
    entries = {"weight": TensorStorageMetadata(properties, torch.Size([3, 2]), [chunk]), "step": BytesStorageMetadata()}

    def load(strategy, folder, metadata):
        found = metadata.state_dict_metadata
        assert found["step"] is entries["step"] and found["weight"].chunks == [chunk]
        return torch.empty(found["weight"].size, **vars(found["weight"].properties), device="meta")

    tensor = _load_without_strides(load, None, "folder", Metadata(entries))
    assert tensor.shape == (3, 2) and tensor.dtype == torch.bfloat16
    assert vars(properties)["strides"] == (2, 1)


def test_properties_of_an_older_pytorch_stay_as_they_are():
    entry = TensorStorageMetadata(TensorProperties(), torch.Size([1]), [])
    without = dict(vars(entry.properties))
    without.pop("strides", None)

    def load(strategy, folder, metadata):
        return vars(metadata.state_dict_metadata["weight"].properties)

    assert _load_without_strides(load, None, "folder", Metadata({"weight": entry})) == without
    assert dataclasses.is_dataclass(entry.properties)
