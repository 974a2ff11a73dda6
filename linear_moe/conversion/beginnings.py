"""What a conversion to Megatron begins with: a folder's model, a Transformer's with memories in some layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from linear_moe.conversion.config import layout_of
from linear_moe.conversion.files import read_json
from linear_moe.conversion.layers import LayerKinds, kinds_of_config
from linear_moe.conversion.loading import check_complete, read_model
from linear_moe.conversion.memories_from_softmax import Memories, chosen_layers, with_memories
from linear_moe.conversion.names import Entry, Layout, entries
from linear_moe.conversion.transformer_folders import Tensors, is_transformer, softmax_model
from linear_moe.conversion.weights import Weights
from mom_layers.hf.configuration_mom import MomConfig


@dataclass(frozen=True)
class Start:
    """How a Transformer becomes a model with memories.

    Attributes:
        softmax_layers, mom_layers: the words of --softmax-layers and --mom-layers, or None.
        memories: choices for the new layers.
    """

    softmax_layers: str | None = None
    mom_layers: str | None = None
    memories: Memories = Memories()


@dataclass(frozen=True)
class Beginning:
    """A model to convert.

    Attributes:
        config: of the model.
        kinds: its layers.
        tensors: by the names of this format, each computed when it is read.
        layout, table: which tensors there are.
        notes: lines for the user.
    """

    config: MomConfig
    kinds: LayerKinds
    tensors: Tensors
    layout: Layout
    table: list[Entry]
    notes: list[str]


def begin(folder: Path, start: Start, *, hybrid: bool = False) -> Beginning:
    """Reads a folder: a model of this format, FLA's too, or a Transformer. No tensor is read.

    Args:
        start: how layers become MoM layers. Without a word in ``start`` a Transformer keeps every fourth layer, and
            another model is as it is.
        hybrid: Megatron's model is a HybridModel.

    Raises ConversionError for a folder or a choice that cannot be used.
    """
    content = read_json(folder / "config.json")
    chosen = start.softmax_layers is not None or start.mom_layers is not None
    notes: list[str] = []
    if is_transformer(content):
        config, tensors = softmax_model(content, Weights(folder))
    else:
        config, tensors, _ = read_model(folder)
    if is_transformer(content) or chosen:
        before = config
        softmax = chosen_layers(start.softmax_layers, start.mom_layers, config.num_hidden_layers)
        config, tensors = with_memories(config, tensors, softmax, start.memories)
        notes = _notes(before, config)
    kinds = kinds_of_config(config, hybrid=hybrid)
    layout = layout_of(config, kinds)
    table = list(entries(layout))
    check_complete(tensors, table, layout)
    return Beginning(config, kinds, tensors, layout, table, notes)


def _notes(before: MomConfig, after: MomConfig) -> list[str]:
    """What became of a Transformer's layers."""
    softmax = sorted(layer for spec in after.attention_specs() for layer in spec.layers)
    notes = [
        f"{after.num_mom_layers} of {after.num_hidden_layers} layers become MoM layers with {after.num_memories} "
        f"memories; softmax attention stays in {', '.join(map(str, softmax)) or 'none'}"
    ]
    if after.num_mom_layers and any(getattr(spec, "qkv_bias", False) for spec in before.attention_specs()):
        notes.append(
            "MoM layers have no biases: those of the Transformer's queries, keys and values are left out there"
        )
    return notes
