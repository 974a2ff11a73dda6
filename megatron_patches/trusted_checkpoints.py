"""Opens checkpoints without running code that their files name.

A torch_dist checkpoint holds pickles: `.metadata`, the byte entries of its shards, and Transformer Engine's extra
states. A pickle may name any function and call it. PyTorch and Transformer Engine unpickle all three without a limit.
Here a pickle may name only the classes that checkpoints are made of; everything else is refused by name. Where the
author is trusted, `trusting` (a command's --trust-checkpoint) or MOM_TRUST_CHECKPOINT=1 lifts the limit.
"""

import dataclasses
import enum
import importlib
import importlib.util
import io
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megatron_patches.patch import Patch, wrap

VARIABLE = "MOM_TRUST_CHECKPOINT"

_METADATA_NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    # Megatron adds what each process saves; PyTorch 2.15 writes the addition, 2.11 leaves it out.
    "torch.distributed.checkpoint.planner": {
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    },
    "torch.distributed._shard.sharded_tensor.metadata": {"TensorProperties", "MEM_FORMAT_ENCODING"},  # of torch < 2.3
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},  # looks a name up in a table of torch.layout
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},  # the same, of Python 3.13
}  # fmt: skip
"""What a `.metadata` may name, module by module. Nothing of this runs code that the file chooses."""


class UnsafeCheckpoint(pickle.UnpicklingError):
    """A file of a checkpoint names what no checkpoint holds, or reads outside its folder."""


_trusting = False


@contextmanager
def trusting(trust: bool) -> Iterator[None]:
    """While open, checkpoints may name anything where ``trust`` is true; otherwise nothing changes."""
    global _trusting
    before, _trusting = _trusting, _trusting or trust
    try:
        yield
    finally:
        _trusting = before


def is_trusted() -> bool:
    """Whether `trusting` or the environment lifts the limit."""
    return _trusting or os.environ.get(VARIABLE, "").lower() in ("1", "true")


def _refuse(where: object, names: Iterable[str]) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"{where} names {', '.join(sorted(names))}, which no checkpoint of Megatron needs and which may run any code; "
        f"if you trust the author of the file, give --trust-checkpoint (in training: {VARIABLE}=1)"
    )


class _MetadataUnpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO, where: object):
        super().__init__(stream)
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        # Not the base class's search: that follows dots in a name, and renames modules of Python 2.
        if name not in _METADATA_NAMES.get(module, ()):
            raise _refuse(self.where, [f"{module}.{name}"])
        return getattr(importlib.import_module(module), name)


def load_metadata(stream: BinaryIO, where: object = ".metadata") -> Metadata:
    """Unpickles a `.metadata`.

    Raises:
        UnsafeCheckpoint: it names what no checkpoint holds, or a shard outside its folder.
        pickle.UnpicklingError: it is damaged.
    """
    try:
        with _unchanged_classes():
            metadata = _MetadataUnpickler(stream, where).load()
        shards = {info.relative_path for info in _storage(metadata)}
    except UnsafeCheckpoint:
        raise
    except Exception as error:  # what a damaged pickle raises depends on where the damage is
        raise pickle.UnpicklingError(
            f"{where} is damaged, or of a newer PyTorch: {type(error).__name__}: {error}"
        ) from error
    for shard in shards:
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts:
            raise UnsafeCheckpoint(f"{where} names the shard {shard!r}, which is outside the checkpoint's folder")
    return metadata


def _storage(metadata: Metadata) -> list[_StorageInfo]:
    if type(metadata) is not Metadata or type(metadata.state_dict_metadata) is not dict:
        raise TypeError("expected the metadata of a distributed checkpoint")
    infos = list(metadata.storage_data.values())
    for info in infos:
        if type(info) is not _StorageInfo or type(info.relative_path) is not str:
            raise TypeError(f"expected the place of an entry in a shard, got {type(info).__name__}")
    return infos


@contextmanager
def _unchanged_classes() -> Iterator[None]:
    """Raises UnsafeCheckpoint where a pickle set attributes of the classes themselves, after taking them back."""
    found = [
        getattr(importlib.import_module(module), name)
        for module, names in _METADATA_NAMES.items()
        if module.startswith("torch.distributed")
        for name in names
    ]
    # A member of an enumeration is one object for the whole process, like a class.
    found += [member for kind in found if issubclass(kind, enum.Enum) for member in kind]
    before = [(owner, dict(vars(owner))) for owner in found]
    try:
        yield
    finally:
        changed = [owner for owner, attributes in before if _restore(owner, attributes)]
        if changed:
            raise UnsafeCheckpoint(f".metadata changes {', '.join(map(str, changed))}, which no checkpoint does")


def _restore(owner: Any, attributes: dict[str, Any]) -> bool:
    """Gives a class or a member of an enumeration its attributes back. Returns whether there was a difference."""
    put, remove = (type.__setattr__, type.__delattr__) if isinstance(owner, type) else (setattr, delattr)
    added = [name for name in vars(owner) if name not in attributes]
    replaced = [name for name, value in attributes.items() if vars(owner).get(name) is not value]
    for name in added:
        remove(owner, name)
    for name in replaced:
        put(owner, name, attributes[name])
    return bool(added or replaced)


def load_entry(stream: BinaryIO, **options: Any) -> Any:
    """Loads what `torch.save` wrote, by PyTorch's own restricted unpickler: tensors, plain values, what Megatron has
    registered with PyTorch, and Megatron's enumerations and data classes.

    Raises:
        UnsafeCheckpoint: it names something else.
        pickle.UnpicklingError: it is damaged.
    """
    start = stream.tell()
    try:
        return torch.load(stream, weights_only=True, **options)
    except pickle.UnpicklingError as error:
        stream.seek(start)
        allowed, refused = _examine(stream, error)
        if refused:
            raise _refuse("an entry of the checkpoint", refused) from None
    stream.seek(start)
    with torch.serialization.safe_globals(allowed):
        return torch.load(stream, weights_only=True, **options)


def _examine(stream: BinaryIO, error: pickle.UnpicklingError) -> tuple[list, list[str]]:
    """The classes to allow besides those of PyTorch, and the names of everything else. Raises UnpicklingError, without
    PyTorch's advice to lift the limit, where the stream does not say what it names."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(stream)
    except Exception:  # not a whole file in the format that torch.save has written since 1.6
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if names:
            return [], names
    if not names:
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        raise pickle.UnpicklingError(f"an entry of the checkpoint is not what torch.save writes: {reason}") from None
    allowed, refused = [], []
    for name in names:
        found = _known_class(name)
        if found is None:
            refused.append(name)
        else:
            allowed.append((found, name))
    return allowed, refused


def _known_class(full_name: str) -> Any:
    """An enumeration or a data class of Megatron, or NumPy's array of a release before 2; None for anything else."""
    if full_name == "numpy.core.multiarray._reconstruct":
        from numpy._core.multiarray import _reconstruct

        return _reconstruct
    module, _, name = full_name.rpartition(".")
    if not module.startswith(("megatron.core.", "megatron.training.")):
        return None
    try:
        found = vars(importlib.import_module(module)).get(name)
    except ImportError:
        return None
    if not isinstance(found, type) or found.__module__ != module:
        return None
    return found if issubclass(found, enum.Enum) or dataclasses.is_dataclass(found) else None


def read_metadata(reader: FileSystemReader) -> Metadata:
    """The metadata of a checkpoint, read with a limit on what the file may name.

    Raises OSError, and the errors of `load_metadata`.
    """
    return _read_metadata(FileSystemReader.read_metadata, reader)


def _read_metadata(read_metadata, reader, *args, **kwargs) -> Metadata:
    """`FileSystemReader.read_metadata` with a limit on what the file may name."""
    if is_trusted():
        return read_metadata(reader, *args, **kwargs)
    path = reader._get_metadata_path(kwargs.get("rank"))
    try:
        with reader.fs.create_stream(path, "rb") as stream:
            metadata = load_metadata(stream, path)
    except pickle.UnpicklingError as error:
        reader.refusal = error
        raise
    # What PyTorch's own function does with the object.
    if getattr(metadata, "storage_meta", None) is None:
        metadata.storage_meta = StorageMeta()
    metadata.storage_meta.load_id = reader.load_id
    return metadata


def _load_state_dict(load_state_dict, state_dict, storage_reader, *args, **kwargs) -> None:
    """PyTorch's loading, with our error where it would say that there is no metadata, or raise CheckpointException,
    which is no Exception."""
    try:
        load_state_dict(state_dict, storage_reader, *args, **kwargs)
    except CheckpointException as error:
        failures = [getattr(storage_reader, "refusal", None), *(failure for failure, _ in error.failures.values())]
        for failure in failures:
            if isinstance(failure, pickle.UnpicklingError):
                raise failure from None
        raise


def _load_bytes(load_bytes, planner, read_item, value: io.BytesIO) -> None:
    """`DefaultLoadPlanner.load_bytes` with a limit on what the entry may name."""
    if is_trusted():
        load_bytes(planner, read_item, value)
        return
    name, content = read_item.dest_index.fqn, load_entry(value)
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[name], content)
    else:
        planner.state_dict[name] = content


def _set_extra_state(set_extra_state, module, state) -> None:
    """Transformer Engine's `set_extra_state`: the pickle in a byte tensor is first loaded with Megatron's limit."""
    if isinstance(state, torch.Tensor) and state.numel() and not is_trusted():
        from megatron.core.safe_globals import SafeUnpickler

        try:
            SafeUnpickler(io.BytesIO(state.detach().cpu().numpy().tobytes())).load()
        except Exception as error:
            raise UnsafeCheckpoint(
                f"the extra state of a {type(module).__name__}: {error}; if you trust the author of the checkpoint, "
                f"set {VARIABLE}=1"
            ) from error
    set_extra_state(module, state)


def _targets() -> tuple:
    targets = [
        wrap("torch.distributed.checkpoint.filesystem", "FileSystemReader.read_metadata", _read_metadata),
        wrap("torch.distributed.checkpoint.state_dict_loader", "_load_state_dict", _load_state_dict),
        wrap("torch.distributed.checkpoint.default_planner", "DefaultLoadPlanner.load_bytes", _load_bytes),
    ]
    if importlib.util.find_spec("transformer_engine") is not None:
        targets += [
            wrap("transformer_engine.pytorch.module.base", "TransformerEngineBaseModule.set_extra_state",
                 _set_extra_state),
            wrap("transformer_engine.pytorch.ops.op", "BasicOperation.set_extra_state", _set_extra_state),
        ]  # fmt: skip
    return tuple(targets)


PATCH = Patch(
    name="trusted-checkpoints",
    reason="loading a checkpoint would run any code that its pickles name",
    removed_when="torch.distributed.checkpoint and Transformer Engine unpickle with a limit on classes",
    targets=_targets(),
)
