"""One table of names between Megatron's checkpoints and the Hugging Face format (FLA's), read in both directions.

Megatron keeps weights that it multiplies together in one tensor; the Hugging Face format keeps every projection on its
own. A :class:`WeightRow` says which Hugging Face tensors one Megatron tensor holds; its :class:`Transform` splits the
Megatron tensor and joins the parts again, without arithmetic, so that a round trip is exact to the bit. Shapes are part
of the table: a row names the dimensions of each Hugging Face tensor, and Megatron's shape follows by joining. The rows
of raw gates and of a rule's parameters come from the memory update rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mom_layers.recur.rules import MemoryRule, get_rule


@dataclass(frozen=True)
class Layout:
    """The sizes of a model on which the names and shapes of its tensors depend.

    Attributes:
        dims: size of every dimension that the table names.
        num_layers: of the decoder.
        attention_layers: indices of the layers whose token mixer is softmax attention.
        num_memories: of a MoM layer, without the shared memory.
        shared_memory: whether a layer has a shared memory.
        single_kv_proj: whether all memories have one projection; its tensors then have the shared memory's names.
        tied: the output layer uses the embedding's weight.
        num_query_groups: key-value heads of a softmax layer.
        memory_rule: name of the memory update rule.
    """

    dims: dict[str, int]
    num_layers: int
    attention_layers: frozenset[int]
    num_memories: int
    shared_memory: bool
    single_kv_proj: bool
    tied: bool
    num_query_groups: int = 1
    memory_rule: str = "gated_deltanet"


@dataclass(frozen=True)
class Transform:
    """How one Megatron tensor holds several Hugging Face tensors.

    Attributes:
        split: (Megatron tensor, layout, number of Hugging Face tensors) -> the Hugging Face tensors, in the row's
            order.
        join: (Hugging Face tensors, layout) -> the Megatron tensor.
    """

    split: Callable[[Tensor, Layout, int], Sequence[Tensor]]
    join: Callable[[Sequence[Tensor], Layout], Tensor]


SAME = Transform(split=lambda tensor, layout, count: [tensor], join=lambda parts, layout: parts[0])
STACKED = Transform(
    split=lambda tensor, layout, count: tensor.unbind(0), join=lambda parts, layout: torch.stack(tuple(parts))
)
ROWS = Transform(
    split=lambda tensor, layout, count: tensor.chunk(count), join=lambda parts, layout: torch.cat(tuple(parts))
)
# PyTorch's depthwise convolutions have a dimension of one input channel.
CHANNELS = Transform(
    split=lambda tensor, layout, count: [tensor.unsqueeze(1)], join=lambda parts, layout: parts[0].squeeze(1)
)


def _split_qkv(tensor: Tensor, layout: Layout, count: int) -> list[Tensor]:
    groups, hidden = layout.num_query_groups, tensor.shape[1]
    size = layout.dims["keys_values"] // groups
    grouped = tensor.view(groups, -1, hidden)
    return [part.reshape(-1, hidden) for part in grouped.split([grouped.shape[1] - 2 * size, size, size], dim=1)]


def _join_qkv(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    groups, hidden = layout.num_query_groups, parts[0].shape[1]
    return torch.cat([part.view(groups, -1, hidden) for part in parts], dim=1).flatten(0, 1)


# Megatron orders the rows of its fused projection by query group: queries, key and value of the first group, and so on.
QKV = Transform(split=_split_qkv, join=_join_qkv)


@dataclass(frozen=True)
class WeightRow:
    """One Megatron tensor and the Hugging Face tensors it holds.

    Attributes:
        megatron: name, in a layer without its prefix.
        hf: (name, dimensions) of each Hugging Face tensor, in a layer without its prefix. A name with ``{memory}``
            stands for one tensor a memory, and for no tensor where all memories share a projection.
        transform: how the Megatron tensor holds the Hugging Face tensors.
        layers: which layers have the tensor ("mom", "attention" or "all"); None for a tensor outside the layers.
        padded: Megatron may store more rows than the model has (vocabulary padding).
        exact: the tensor keeps its stored type, whatever type the other tensors are converted to.
    """

    megatron: str
    hf: tuple[tuple[str, str], ...]
    transform: Transform = SAME
    layers: str | None = "all"
    padded: bool = False
    exact: bool = False


def _per_memory(letter: str, megatron: str, rows: str) -> WeightRow:
    names = (f"attn.{letter}_proj.{{memory}}.weight", f"attn.shared_{letter}.weight")
    return WeightRow(
        f"self_attention.memory_proj.{megatron}",
        tuple((name, f"{rows} hidden") for name in names),
        transform=STACKED,
        layers="mom",
    )


def _projection_alone(letter: str, megatron: str, rows: str) -> WeightRow:
    return _mom(f"in_proj.weight.{megatron}", f"{letter}_proj.weight", f"{rows} hidden")


def _mom(megatron: str, hf: str, dims: str, **kwargs) -> WeightRow:
    return WeightRow(f"self_attention.{megatron}", ((f"attn.{hf}", dims),), layers="mom", **kwargs)


def weight_rows(rule: MemoryRule, *, alone: bool = False) -> tuple[WeightRow, ...]:
    """The table for models whose memories have this rule: before the layers, in them, after them.

    alone: the layers have one memory and no router.
    """
    project = _projection_alone if alone else _per_memory
    gates = [project(gate.hf, gate.name, f"gate.{gate.name}") for gate in rule.raw_gates]
    parameters = [
        _mom(name, name, " ".join(["heads", *(f"{name}.{i}" for i in range(len(shape)))]), exact=True)
        for name, shape in rule.parameter_shapes(1).items()
    ]
    mixer = MIXER_ALONE if alone else MIXER
    return (*BEFORE_THE_LAYERS, *mixer, *gates, *parameters, *ATTENTION, *MLP, *AFTER_THE_LAYERS)


def rule_dimensions(rule: MemoryRule, num_heads: int, head_dim: int, value_dim: int) -> dict[str, int]:
    """Sizes of the dimensions that :func:`weight_rows` names after a rule's gates and parameters."""
    dims = {f"gate.{gate.name}": num_heads * gate.width(head_dim, value_dim) for gate in rule.raw_gates}
    for name, shape in rule.parameter_shapes(head_dim).items():
        dims |= {f"{name}.{i}": size for i, size in enumerate(shape)}
    return dims


BEFORE_THE_LAYERS = (
    WeightRow("embedding.word_embeddings.weight", (("model.embeddings.weight", "vocabulary hidden"),),
              layers=None, padded=True),
)  # fmt: skip
INNER = (
    _mom("q_conv", "q_conv1d.weight", "keys one width", transform=CHANNELS),
    _mom("k_conv", "k_conv1d.weight", "keys one width", transform=CHANNELS),
    _mom("v_conv", "v_conv1d.weight", "values one width", transform=CHANNELS),
    _mom("norm_weight", "o_norm.weight", "value"),
    _mom("out_proj.weight", "o_proj.weight", "hidden values"),
)
MIXER = (
    WeightRow("input_layernorm.weight", (("attn_norm.weight", "hidden"),), layers="mom"),
    _mom("router.weight", "gate.weight", "memories hidden"),
    _mom("in_proj.weight.query", "q_proj.weight", "keys hidden"),
    _per_memory("k", "key", "keys"),
    _per_memory("v", "value", "values"),
    _mom("in_proj.weight.gate", "g_proj.weight", "values hidden"),
    *INNER,
)
MIXER_ALONE = (
    WeightRow("self_attention.in_proj.layer_norm_weight", (("attn_norm.weight", "hidden"),), layers="mom"),
    _projection_alone("q", "query", "keys"),
    _projection_alone("k", "key", "keys"),
    _projection_alone("v", "value", "values"),
    _projection_alone("g", "output_gate", "values"),
    *INNER,
)
ATTENTION = (
    WeightRow("self_attention.linear_qkv.layer_norm_weight", (("attn_norm.weight", "hidden"),), layers="attention"),
    WeightRow("self_attention.linear_qkv.weight",
              (("attn.q_proj.weight", "hidden hidden"), ("attn.k_proj.weight", "keys_values hidden"),
               ("attn.v_proj.weight", "keys_values hidden")),
              transform=QKV, layers="attention"),
    WeightRow("self_attention.linear_proj.weight", (("attn.o_proj.weight", "hidden hidden"),), layers="attention"),
)  # fmt: skip
MLP = (
    WeightRow("mlp.linear_fc1.layer_norm_weight", (("mlp_norm.weight", "hidden"),)),
    WeightRow("mlp.linear_fc1.weight",
              (("mlp.gate_proj.weight", "intermediate hidden"), ("mlp.up_proj.weight", "intermediate hidden")),
              transform=ROWS),
    WeightRow("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hidden intermediate"),)),
)  # fmt: skip
AFTER_THE_LAYERS = (
    WeightRow("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),), layers=None),
    WeightRow("output_layer.weight", (("lm_head.weight", "vocabulary hidden"),), layers=None, padded=True),
)

EXTRA_STATES = {
    "mom": ("input_layernorm", "self_attention.in_proj", "self_attention.out_proj"),
    "attention": ("self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj"),
    "all": ("mlp.linear_fc1", "mlp.linear_fc2"),
    None: ("decoder.final_layernorm",),
}
"""Modules that read an ``_extra_state`` from a checkpoint (Transformer Engine's, for FP8), which is empty here."""


@dataclass(frozen=True)
class Entry:
    """A row of the table for one tensor of one model. ``layer`` is None where the tensor is not a layer's."""

    row: WeightRow
    layer: int | None
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    layout: Layout

    @property
    def hf_names(self) -> list[str]:
        return [name for name, _ in self.hf]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor, without vocabulary padding."""
        return tuple(self.join([torch.empty(shape, device="meta") for _, shape in self.hf]).shape)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Hugging Face tensors of a Megatron tensor, in the order of ``hf``."""
        return list(self.row.transform.split(tensor, self.layout, len(self.hf)))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor of Hugging Face tensors in the order of ``hf``."""
        return self.row.transform.join(parts, self.layout)


def entries(layout: Layout) -> Iterator[Entry]:
    """Every tensor of a model, in the order of its layers: what comes before them, the layers, what comes after."""
    rows = weight_rows(get_rule(layout.memory_rule), alone=layout.num_memories == 0)
    if layout.dims["width"] == 1:  # no convolutions
        rows = tuple(row for row in rows if "width" not in row.hf[0][1].split())
    yield from _model_entries(BEFORE_THE_LAYERS, layout)
    for layer in range(layout.num_layers):
        kind = "attention" if layer in layout.attention_layers else "mom"
        for row in rows:
            if row.layers in (kind, "all"):
                yield _entry(row, layout, layer)
    yield from _model_entries(AFTER_THE_LAYERS, layout)


def _model_entries(rows: Sequence[WeightRow], layout: Layout) -> Iterator[Entry]:
    for row in rows:
        if not (layout.tied and row.megatron == "output_layer.weight"):
            yield _entry(row, layout, None)


def _entry(row: WeightRow, layout: Layout, layer: int | None) -> Entry:
    prefix = "" if layer is None else f"model.layers.{layer}."
    names = []
    for name, dims in row.hf:
        shape = tuple(layout.dims[dim] for dim in dims.split())
        if "{memory}" in name:
            memories = 0 if layout.single_kv_proj else layout.num_memories
        elif ".shared_" in name:
            memories = int(layout.shared_memory or layout.single_kv_proj)
        else:
            memories = 1
        names += [(prefix + name.format(memory=memory), shape) for memory in range(memories)]
    return Entry(row, layer, tuple(names), layout)
