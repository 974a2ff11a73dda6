"""Loads a checkpoint whose layers have other names: of the other model class, or of other modules.

A layer of a GPTModel is a mixer with an MLP, and a HybridModel has a layer for each: layer g of a GPTModel is layers
2 g and 2 g + 1 of a HybridModel whose pattern alternates between mixers and MLPs. A GPTModel whose layers are all of
one kind stores one tensor for all layers, with the layer as first dimension; every other model stores the layers apart.
Megatron's local modules and Transformer Engine's store the norm before a projection under different names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensorFactory,
)

from megatron_patches.patch import Patch, wrap

_ALIASES = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("input_layernorm.", "self_attention.in_proj.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_"),
)
"""Two names of one norm: of a module of its own, and as a part of the projection that follows."""
_FINAL_NORMS = ("decoder.final_layernorm.", "decoder.final_norm.")
"""The name in a GPTModel, and in a HybridModel."""
_LAYER = re.compile(r"(?P<before>(?:.*\.)?)decoder\.layers\.(?:(?P<index>\d+)\.)?(?P<rest>.+)")
_PREDICTION = re.compile(
    r"(?P<before>(?:.*\.)?)mtp\.layers\.(?P<step>\d+)\."
    r"(?:transformer_layer|mtp_model_layer(?:\.layers\.(?P<index>\d+))?)\.(?P<rest>.+)"
)
_MLP = ("mlp.", "pre_mlp_layernorm.")


@dataclass(frozen=True)
class _Names:
    """What a checkpoint stores: the name of every tensor and object -> its global shape."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def of_hybrid_model(self) -> bool:
        return any(_FINAL_NORMS[1] in name for name in self.shapes)


def _is_mlp(rest: str) -> bool:
    return rest.startswith(_MLP)


def _same_norm(rest: str) -> Iterator[str]:
    """The name inside a layer, and the other names that the weight can have."""
    yield rest
    for own, fused in _ALIASES:
        for name, other in ((own, fused), (fused, own)):
            if rest.startswith(name):
                yield other + rest.removeprefix(name)


def _is_hybrid_model(names: list[str]) -> bool:
    """Whether a model's names are those of a HybridModel: no layer has both a mixer and an MLP."""
    if any(norm in name for name in names for norm in _FINAL_NORMS):
        return any(_FINAL_NORMS[1] in name for name in names)
    parts: dict[str | None, set[bool]] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        parts.setdefault(match["index"], set()).add(_is_mlp(match["rest"]))
    return all(len(both) == 1 for both in parts.values())


def _places(name: str, layer: int | None, hybrid: bool, stored: _Names) -> Iterator[tuple[str, int | None]]:
    """Names that a weight of the model may have in the checkpoint, each with the layer where the layer is the stored
    tensor's first dimension.

    Args:
        name: in the model.
        layer: where the layer is the tensor's first dimension in the model; None elsewhere.
        hybrid: whether the model is a HybridModel.
    """
    match = _LAYER.fullmatch(name) or _PREDICTION.fullmatch(name)
    if match is None or hybrid == stored.of_hybrid_model:
        yield name, layer
    if match is None:
        for mine, other in (_FINAL_NORMS, _FINAL_NORMS[::-1]):
            if mine in name:
                yield name.replace(mine, other), None
        return
    rest, step = match["rest"], match.groupdict().get("step")
    index = int(match["index"]) if match["index"] is not None else layer or 0
    place = index if hybrid else 2 * index + _is_mlp(rest)  # in a HybridModel
    if place % 2 != _is_mlp(rest) and hybrid != stored.of_hybrid_model:
        return  # no layer of a GPTModel has this layer
    decoder = f"{match['before']}decoder.layers."
    for same in _same_norm(rest):
        if step is not None:
            prefix = f"{match['before']}mtp.layers.{step}."
            if stored.of_hybrid_model:
                yield f"{prefix}mtp_model_layer.layers.{place}.{same}", None
            else:
                yield f"{prefix}transformer_layer.{same}", None
                yield f"{prefix}mtp_model_layer.{same}", None
        elif stored.of_hybrid_model:
            yield f"{decoder}{place}.{same}", None
        else:
            gpt_layer = index if not hybrid else place // 2
            yield f"{decoder}{gpt_layer}.{same}", None
            yield f"{decoder}{same}", gpt_layer


def _without_layer(entry: ShardedBase) -> None:
    """Takes the first dimension, the layer, from where an entry lies in the stored tensor."""
    entry.global_shape, entry.global_offset = entry.global_shape[1:], entry.global_offset[1:]
    if isinstance(entry, ShardedObject):
        entry.global_shape, entry.global_offset = entry.global_shape or (1,), entry.global_offset or (0,)
    else:
        entry.axis_fragmentations, entry.prepend_axis_num = entry.axis_fragmentations[1:], entry.prepend_axis_num - 1


def _with_layer(entry: ShardedBase, layer: int, layers: int) -> None:
    """Puts the layer before the dimensions of an entry."""
    if isinstance(entry, ShardedObject) and entry.global_shape == (1,):
        entry.global_shape, entry.global_offset = (), ()
    entry.global_shape, entry.global_offset = (layers, *entry.global_shape), (layer, *entry.global_offset)
    if not isinstance(entry, ShardedObject):
        entry.axis_fragmentations = (layers, *entry.axis_fragmentations)
        entry.prepend_axis_num += 1


def _rename(entry: ShardedBase, hybrid: bool, stored: _Names):
    """The entry, under the name that the checkpoint has for the weight."""
    if isinstance(entry, ShardedTensorFactory):
        build = entry.build_fn

        def renamed(*args, **keywords):
            return dict_list_map_inplace(lambda built: _rename(built, hybrid, stored), build(*args, **keywords))

        entry.build_fn = renamed
        return entry
    if not isinstance(entry, ShardedBase):
        return entry
    match = _LAYER.fullmatch(entry.key)
    stacked = match is not None and match["index"] is None
    mine = entry.global_offset[0] if stacked else None
    found = next(
        (place for place in _places(entry.key, mine, hybrid, stored) if _stores(stored, entry, *place, mine)), None
    )
    if found is None:
        if (
            isinstance(entry, ShardedObject)
            and entry.key.endswith("._extra_state")
            and hybrid != stored.of_hybrid_model
        ):
            return LocalNonpersistentObject(entry.data)  # a HybridModel's output layer has one, a GPTModel's none
        return entry
    name, layer = found
    if (name, layer) != (entry.key, mine):
        if stacked:
            _without_layer(entry)
        if layer is not None:
            _with_layer(entry, layer, stored.shapes[name][0])
        entry.key = name
    return entry


def _stores(stored: _Names, entry: ShardedBase, name: str, layer: int | None, mine: int | None) -> bool:
    """Whether the checkpoint has this name, with as many dimensions as the entry would have there."""
    if name not in stored.shapes:
        return False
    if isinstance(entry, ShardedObject):
        return True
    dimensions = len(entry.global_shape) - (mine is not None) + (layer is not None)
    return len(stored.shapes[name]) == dimensions


def use_stored_names(sharded_state_dict: dict, stored_shapes: dict[str, tuple[int, ...]]) -> None:
    """Changes the names of a sharded state dict's entries, in place, to those of the checkpoint that will be read.

    Args:
        sharded_state_dict: of a model, or of a model and its optimizer.
        stored_shapes: name of every tensor and object of the checkpoint -> global shape.
    """
    entries = [entry for entry in nested_values(sharded_state_dict) if isinstance(entry, ShardedBase)]
    stored = _Names(stored_shapes)
    names = [entry.key for entry in entries]
    hybrid = _is_hybrid_model([name for name in names if not name.startswith(("optimizer", "chained"))])
    if hybrid == stored.of_hybrid_model and set(names) <= stored_shapes.keys():
        return
    dict_list_map_inplace(lambda entry: _rename(entry, hybrid, stored), sharded_state_dict)


def _load(load, sharded_state_dict, checkpoint_dir, *args, **keywords):
    from megatron.core.dist_checkpointing.serialization import load_sharded_metadata

    names = [entry.key for entry in nested_values(sharded_state_dict) if isinstance(entry, ShardedBase)]
    if any(_LAYER.fullmatch(name) or any(norm in name for norm in _FINAL_NORMS) for name in names):
        stored = load_sharded_metadata(str(checkpoint_dir)).values()
        use_stored_names(sharded_state_dict, {entry.key: tuple(entry.global_shape) for entry in stored})
    return load(sharded_state_dict, checkpoint_dir, *args, **keywords)


PATCH = Patch(
    name="checkpoint-layer-names",
    reason="a GPTModel with memories and a HybridModel of the same layers name their weights differently, and so do "
    "Megatron's local modules and Transformer Engine's",
    removed_when="checkpoints of a GPTModel and of a HybridModel load into each other, for every symbol of a pattern",
    targets=(wrap("megatron.core.dist_checkpointing.serialization", "load", _load),),
)
