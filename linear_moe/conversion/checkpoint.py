"""Megatron's torch_dist checkpoints without Megatron: one process, no GPU, tensor by tensor.

Megatron's checkpoints are PyTorch's distributed checkpoints: tensors stored in chunks under global names that are the
same for every parallel layout. A model whose layers are all alike has its layers stacked, one tensor for a parameter of
all layers (``decoder.layers.mlp...`` [L, ...]); other models have a name for each layer (``decoder.layers.7.mlp...``).
The experts of a layer are stacked in both kinds of models.
"""

from __future__ import annotations

import io
import pickle
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from linear_moe.conversion.files import ConversionError, write_json
from linear_moe.conversion.layers import LayerKinds, kinds_of_pattern, kinds_of_tensors
from linear_moe.conversion.names import EXTRA_STATES, Entry, Layout, Place, entries, places
from megatron_patches.trusted_checkpoints import UnsafeCheckpoint, read_metadata
from mom_layers.hf.fields import FIELDS

TRACKER = "latest_checkpointed_iteration.txt"
MODEL_PREFIXES = ("embedding.", "decoder.", "output_layer.", "mtp.", "encoder.")
COMMON_STATE = "common_state/shard_0_1"
BROKEN = (RuntimeError, ValueError, EOFError, AssertionError, AttributeError, ImportError, pickle.UnpicklingError)
"""What reading a damaged file raises, depending on where the damage is."""


def find_checkpoint(load: Path, iteration: int | None) -> Path:
    """The folder of one checkpoint: ``load`` itself, or what its tracker file or ``iteration`` says.

    Raises ConversionError where there is none, or none in the torch_dist format.
    """
    if not load.is_dir():
        raise ConversionError(f"--load {load}: no such folder")
    folder = load
    if not (load / ".metadata").is_file():
        if iteration is not None:
            name = f"iter_{iteration:07d}"
        elif (load / TRACKER).is_file():
            word = (load / TRACKER).read_text().strip()
            name = f"iter_{int(word):07d}" if word.isdecimal() else word
        else:
            raise ConversionError(f"--load {load} is not a Megatron checkpoint: it has no {TRACKER}")
        folder = load / name
    elif iteration is not None:
        raise ConversionError(f"--iteration {iteration}: --load {load} is one checkpoint; give the folder above it")
    if not folder.is_dir():
        there = sorted(path.name for path in load.iterdir() if path.is_dir())
        given = "" if iteration is None else f"--iteration {iteration}: "
        raise ConversionError(f"{given}--load {load} has no {folder.name}; there are {', '.join(there) or 'none'}")
    if not (folder / ".metadata").is_file():
        if any(path.name.startswith("mp_rank_") for path in folder.iterdir()):
            raise ConversionError(f"{folder} is in Megatron's legacy format: save it with --ckpt-format torch_dist")
        raise ConversionError(f"{folder} is not a torch_dist checkpoint: it has no .metadata")
    return folder


class Unknown:
    """Stands for an object of a class that is not wanted here."""

    def __init__(self, *args, **kwargs):
        pass


def _load_state(data) -> object:
    """Unpickles safely: what is neither a plain value nor a tensor becomes `Unknown`, without importing its class."""
    known = {"argparse.Namespace": Namespace}
    unknown = torch.serialization.get_unsafe_globals_in_checkpoint(data)
    data.seek(0)
    with torch.serialization.safe_globals([(known.get(name, Unknown), name) for name in unknown]):
        return torch.load(data, map_location="cpu", weights_only=True)


class _Destination(LoadPlanner):
    """Reads into one tensor, or one buffer of bytes."""

    def __init__(self, tensor: torch.Tensor | None = None):
        self.tensor = tensor
        self.bytes = io.BytesIO()

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None: ...

    def create_local_plan(self) -> LoadPlan: ...

    def create_global_plan(self, global_plan) -> list[LoadPlan]: ...

    def finish_plan(self, central_plan) -> LoadPlan: ...

    def load_bytes(self, read_item, value) -> None:
        self.bytes = value

    def resolve_tensor(self, read_item) -> torch.Tensor:
        target = self.tensor
        for dim, (first, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dim, first, length)
        return target

    def commit_tensor(self, read_item, tensor) -> None: ...


class MegatronCheckpoint:
    """One checkpoint folder: its arguments, and the model's tensors, each read when asked for.

    Attributes:
        folder: of the checkpoint.
        args: Megatron's arguments that it was written with.
        iteration: that it was written at.

    Raises ConversionError for one that is incomplete or broken.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._reader = dcp.FileSystemReader(folder)
        try:
            metadata = read_metadata(self._reader)
        except UnsafeCheckpoint as error:
            raise ConversionError(str(error)) from error
        except BROKEN as error:
            raise ConversionError(f"{folder / '.metadata'} cannot be read: {error}") from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = metadata.state_dict_metadata
        self._check_files(metadata)
        common = self._common_state()
        self.iteration = common.get("iteration", 0)
        self.args = common.get("args")
        if not isinstance(self.args, Namespace):
            raise ConversionError(f"{folder} holds no arguments: it was not written by megatron.training")
        for field in FIELDS:  # arguments that are newer than the checkpoint have their defaults
            if field.setting and field.megatron.startswith("mom_") and not hasattr(self.args, field.megatron):
                setattr(self.args, field.megatron, field.default)

    def _check_files(self, metadata) -> None:
        ends: dict[str, int] = {}
        for info in metadata.storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                raise ConversionError(f"{self.folder} is incomplete: {name} is missing")
            if path.stat().st_size < end:
                raise ConversionError(f"{path} was cut short: {path.stat().st_size} bytes of at least {end}")

    def _common_state(self) -> dict:
        legacy = self.folder / "common.pt"
        if not legacy.is_file() and COMMON_STATE not in self._stored:
            raise ConversionError(f"{self.folder} is not a torch_dist checkpoint of Megatron: it has no common state")
        try:
            if legacy.is_file():
                with legacy.open("rb") as file:
                    return _load_state(file)
            destination = _Destination()
            index, whole = MetadataIndex(COMMON_STATE), torch.Size([0])
            item = ReadItem(LoadItemType.BYTE_IO, index, whole, index, whole, whole)
            self._reader.read_data(LoadPlan([item]), destination)
            return _load_state(destination.bytes)[0]
        except BROKEN as error:
            raise ConversionError(f"the arguments in {self.folder} cannot be read: {error}") from error

    def names(self) -> set[str]:
        """Every tensor of the model."""
        return {
            name for name, stored in self._stored.items() if name.startswith(MODEL_PREFIXES) and hasattr(stored, "size")
        }

    def layer_kinds(self) -> LayerKinds:
        """Token mixer and MLP of every layer: of a HybridModel as its pattern says, of a GPT model as the tensors say.

        Raises ConversionError for a pattern with layers that the Hugging Face format lacks.
        """
        pattern = getattr(self.args, "hybrid_layer_pattern", None)
        if pattern:
            return kinds_of_pattern(pattern, getattr(self.args, "mtp_hybrid_override_pattern", None), self.args)
        return kinds_of_tensors(self.names(), self.args.num_layers)

    def rows(self, name: str) -> int:
        """First dimension of a tensor that is not a layer's, padding included; 0 where there is none of that name."""
        stored = self._stored.get(name)
        return stored.size[0] if stored is not None else 0

    def place(self, entry: Entry) -> Place:
        """Where a tensor lies here. Raises ConversionError where it is not stored."""
        found = next((place for place in entry.places if place.name in self._stored), None)
        if found is None:
            first = entry.places[0].name
            raise ConversionError(f"{self.folder} has no {first}: its layers are not what its arguments say")
        return found

    def describe(self, entry: Entry) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape, without the axes of stacked layers and of experts, and type of a tensor.

        Raises ConversionError where the checkpoint has another number of experts than its arguments say.
        """
        place = self.place(entry)
        stored = self._stored[place.name]
        sizes = tuple(stored.size)
        if entry.expert is not None and len(sizes) >= len(place.leading):
            held, (_, expected) = sizes[len(place.leading) - 1], place.leading[-1]
            if held != expected:
                raise ConversionError(
                    f"{place.name} has {held} experts, and the arguments stored with it say --num-experts {expected}: "
                    f"the checkpoint in {self.folder} is not whole, or is another model's"
                )
        return sizes[len(place.leading) :], stored.properties.dtype

    def read(self, entry: Entry) -> torch.Tensor:
        """A tensor without padding rows; of stacked layers and experts, the slice of the entry's."""
        place = self.place(entry)
        stored, shape = self._stored[place.name], torch.Size(entry.shape)
        offsets = torch.Size([*(index for index, _ in place.leading), *[0] * len(shape)])
        sizes = torch.Size([*[1] * len(place.leading), *shape])
        tensor = torch.empty(sizes, dtype=stored.properties.dtype)
        plan = LoadPlan(create_read_items_for_chunk_list(place.name, stored, [ChunkStorageMetadata(offsets, sizes)]))
        if sum(torch.Size(item.lengths).numel() for item in plan.items) != tensor.numel():
            raise ConversionError(f"{self.folder} holds only a part of {place.name}")
        try:
            self._reader.read_data(plan, _Destination(tensor))
        except BROKEN as error:
            raise ConversionError(f"{place.name} in {self.folder} cannot be read: {error}") from error
        return tensor.view(shape)


@dataclass(frozen=True)
class _Chunk:
    item: WriteItem
    load: Callable[[], torch.Tensor | io.BytesIO]


class _Source(SavePlanner):
    """Produces every tensor only when it is written."""

    def __init__(self, chunks: Sequence[_Chunk]):
        self._chunks = chunks
        self._load = {chunk.item.index.fqn + str(chunk.item.index.offset): chunk.load for chunk in chunks}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None: ...

    def create_local_plan(self) -> SavePlan:
        return SavePlan([chunk.item for chunk in self._chunks])

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem):
        return self._load[write_item.index.fqn + str(write_item.index.offset)]()


def write_checkpoint(
    folder: Path,
    layout: Layout,
    dtype_of: Callable[[Entry], torch.dtype],
    read: Callable[[Entry], torch.Tensor],
    args: Namespace,
) -> None:
    """Writes a release checkpoint: weights and arguments, no optimizer.

    Args:
        folder: new; it becomes what ``--load`` takes.
        layout: of the model.
        dtype_of, read: type of a Megatron tensor, and the tensor, called when it is written.
        args: to store.
    """
    chunks = [_bytes(COMMON_STATE, _common_state(args))]
    for entry in entries(layout):
        for place in _written(entry.places, layout):
            leading = place.leading
            shape, size = [*[1] * len(leading), *entry.shape], [*(count for _, count in leading), *entry.shape]
            offsets = torch.Size([*(index for index, _ in leading), *[0] * len(entry.shape)])
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, torch.Size(shape)),
                properties=TensorProperties(dtype=dtype_of(entry)),
                size=torch.Size(size),
            )
            item = WriteItem(MetadataIndex(place.name, offsets), WriteItemType.SHARD, tensor_data=data)
            chunks.append(_Chunk(item, lambda entry=entry, shape=shape: read(entry).reshape(shape)))
    chunks += [_bytes(name, [None]) for name in _extra_states(layout)]
    release = folder / "release"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        try:
            dcp.save({}, storage_writer=dcp.FileSystemWriter(release), planner=_Source(chunks), no_dist=True)
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
    write_json(release / "metadata.json", {"sharded_backend": "torch_dist", "sharded_backend_version": 1})
    (folder / TRACKER).write_text("release")


def _common_state(args: Namespace) -> list[dict]:
    return [
        {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "num_floating_point_operations_so_far": 0,
            "content_metadata": {"singleton_local_shards": False},
        }
    ]


def _bytes(name: str, content: object) -> _Chunk:
    def load() -> io.BytesIO:
        data = io.BytesIO()
        torch.save(content, data)
        return data

    return _Chunk(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), load)


def _written(found: Sequence[Place], layout: Layout) -> list[Place]:
    """Of the places that a checkpoint may have a tensor at, those at which a model of this layout looks.

    The last norm's name says of which class the model is, so that a checkpoint has one of the two names.
    """
    other = "decoder.final_layernorm." if layout.hybrid else "decoder.final_norm."
    found = [place for place in found if not place.name.startswith(other)]
    stacked = [place for place in found if place.name.startswith("decoder.layers.") and _is_stacked(place)]
    if layout.stacked:
        return stacked or found
    return [place for place in found if place not in stacked]


def _is_stacked(place: Place) -> bool:
    return not place.name.removeprefix("decoder.layers.").partition(".")[0].isdecimal()


def _extra_states(layout: Layout) -> list[str]:
    wanted = [(None, None, name, None) for name in EXTRA_STATES[None]]
    for layer, kinds in enumerate(zip(layout.mixers, layout.mlps, strict=True)):
        for kind in (*kinds, *(["mtp"] if layer >= layout.num_layers else [])):
            wanted += [(layer, kind, name, None) for name in EXTRA_STATES[kind]]
        if "moe" in kinds:
            experts = range(layout.num_experts)
            wanted += [(layer, "expert", name, expert) for expert in experts for name in EXTRA_STATES["expert"]]
    names = []
    for layer, kind, module, expert in wanted:
        for place in _written(places(layout, f"{module}._extra_state", layer, kind, expert), layout):
            leading = place.leading or ((0, 1),)
            index, count = (".".join(str(axis[i]) for axis in leading) for i in (0, 1))
            names.append(f"{place.name}/shard_{index}_{count}")
    return names
