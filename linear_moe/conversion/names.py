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
    """The sizes and choices of a model on which the names and shapes of its tensors depend.

    Attributes:
        dims: size of every dimension that the table names.
        num_layers: of the decoder. The layers of multi-token prediction are numbered after them.
        mixers: token mixer of each layer: "mom", "attention" or "latent" (multi-latent attention).
        mlps: MLP of each layer: "dense" or "moe".
        num_memories: of a MoM layer, without the shared memory.
        shared_memory: whether a layer has a shared memory.
        single_kv_proj: whether all memories have one projection; its tensors then have the shared memory's names.
        tied: the output layer uses the embedding's weight.
        num_query_groups: key-value heads of a softmax layer.
        memory_rule: name of the memory update rule.
        num_experts: of an MLP with experts.
        options: parts that some models have: the words of `WeightRow.when`.
        hybrid: whether Megatron's model is a HybridModel, in which a mixer and an MLP are layers of their own.
    """

    dims: dict[str, int]
    num_layers: int
    mixers: tuple[str, ...]
    mlps: tuple[str, ...]
    num_memories: int
    shared_memory: bool
    single_kv_proj: bool
    tied: bool
    num_query_groups: int = 1
    memory_rule: str = "gated_deltanet"
    num_experts: int = 0
    options: frozenset[str] = frozenset()
    hybrid: bool = False

    @property
    def attention_layers(self) -> frozenset[int]:
        """Indices of the decoder's layers whose token mixer is softmax attention."""
        return frozenset(layer for layer in range(self.num_layers) if self.mixers[layer] != "mom")

    @property
    def stacked(self) -> bool:
        """Whether Megatron stores a parameter of all layers as one tensor: a GPT model whose arguments describe all
        layers with one word."""
        decoder = set(zip(self.mixers[: self.num_layers], self.mlps[: self.num_layers], strict=True))
        return not self.hybrid and len(decoder) == 1


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
    groups, rest = layout.num_query_groups, tensor.shape[1:]
    size = layout.dims["keys_values"] // groups
    grouped = tensor.view(groups, -1, *rest)
    return [part.reshape(-1, *rest) for part in grouped.split([grouped.shape[1] - 2 * size, size, size], dim=1)]


def _join_qkv(parts: Sequence[Tensor], layout: Layout) -> Tensor:
    groups, rest = layout.num_query_groups, parts[0].shape[1:]
    return torch.cat([part.view(groups, -1, *rest) for part in parts], dim=1).flatten(0, 1)


# Megatron orders the rows of its fused projection by query group: queries, key and value of the first group, and so on.
QKV = Transform(split=_split_qkv, join=_join_qkv)


@dataclass(frozen=True)
class WeightRow:
    """One Megatron tensor and the Hugging Face tensors it holds.

    Attributes:
        megatron: name, in a layer without its prefix.
        hf: (name, dimensions) of each Hugging Face tensor, in a layer without its prefix. A name with ``{memory}``
            stands for one tensor a memory, and for no tensor where all memories share a projection. A row whose names
            have ``{expert}`` stands for a row an expert, each a slice of the Megatron tensor.
        transform: how the Megatron tensor holds the Hugging Face tensors.
        layers: which layers have the tensor: "mom", "attention", "latent", "dense", "moe" or "mtp"; None for a tensor
            outside the layers.
        padded: Megatron may store more rows than the model has (vocabulary padding).
        exact: the tensor keeps its stored type, whatever type the other tensors are converted to.
        also: other names of the Megatron tensor, in models built of other modules. A checkpoint that is written has
            the tensor under every name, so that each of these models reads the checkpoint.
        when: the word of `Layout.options` without which a model lacks the tensor.
    """

    megatron: str
    hf: tuple[tuple[str, str], ...]
    transform: Transform = SAME
    layers: str | None = None
    padded: bool = False
    exact: bool = False
    also: tuple[str, ...] = ()
    when: str | None = None

    @property
    def per_expert(self) -> bool:
        """Whether the Megatron tensor has an axis of experts before the others."""
        return "{expert}" in self.hf[0][0]


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
    layers = (*mixer, *gates, *parameters, *ATTENTION, *LATENT_ATTENTION, *MLP, *EXPERTS)
    return (*BEFORE_THE_LAYERS, *PREDICTION, *layers, *AFTER_THE_LAYERS)


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
    _mom("text_conv", "text_conv1d.weight", "hidden one text_width", transform=CHANNELS, when="text_conv"),
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
INPUT_NORM, MLP_NORM = "input_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"


def _softmax(megatron: str, *hf: tuple[str, str], **kwargs) -> WeightRow:
    names = tuple((f"attn.{name}", dims) for name, dims in hf)
    return WeightRow(f"self_attention.{megatron}", names, **({"layers": "attention"} | kwargs))


ATTENTION = (
    WeightRow("self_attention.linear_qkv.layer_norm_weight", (("attn_norm.weight", "hidden"),), layers="attention",
              also=(INPUT_NORM,)),
    _softmax("linear_qkv.weight", ("q_proj.weight", "queries hidden"), ("k_proj.weight", "keys_values hidden"),
             ("v_proj.weight", "keys_values hidden"), transform=QKV),
    _softmax("linear_qkv.bias", ("q_proj.bias", "queries"), ("k_proj.bias", "keys_values"),
             ("v_proj.bias", "keys_values"), transform=QKV, when="qkv_bias"),
    _softmax("q_layernorm.weight", ("q_norm.weight", "head"), when="qk_norm"),
    _softmax("k_layernorm.weight", ("k_norm.weight", "head"), when="qk_norm"),
    _softmax("linear_proj.weight", ("o_proj.weight", "hidden queries")),
)  # fmt: skip
_LATENT = {"layers": "latent"}
LATENT_ATTENTION = (
    WeightRow(INPUT_NORM, (("attn_norm.weight", "hidden"),), layers="latent",
              also=("self_attention.linear_qkv.layer_norm_weight",)),
    _softmax("linear_q_proj.weight", ("q_proj.weight", "latent_queries hidden"), when="plain_query", **_LATENT),
    _softmax("linear_q_down_proj.weight", ("q_a_proj.weight", "query_latent hidden"), when="latent_query", **_LATENT),
    _softmax("q_layernorm.weight", ("q_a_layernorm.weight", "query_latent"), when="query_latent_norm",
             also=("self_attention.linear_q_up_proj.layer_norm_weight",), **_LATENT),
    _softmax("linear_q_up_proj.weight", ("q_b_proj.weight", "latent_queries query_latent"), when="latent_query",
             **_LATENT),
    _softmax("linear_kv_down_proj.weight", ("kv_a_proj_with_mqa.weight", "latent_and_rope hidden"), **_LATENT),
    _softmax("kv_layernorm.weight", ("kv_a_layernorm.weight", "latent"), when="latent_norm",
             also=("self_attention.linear_kv_up_proj.layer_norm_weight",), **_LATENT),
    _softmax("linear_kv_up_proj.weight", ("kv_b_proj.weight", "latent_keys_values latent"), **_LATENT),
    _softmax("linear_proj.weight", ("o_proj.weight", "hidden latent_values"), **_LATENT),
)  # fmt: skip
MLP = (
    WeightRow(MLP_NORM, (("mlp_norm.weight", "hidden"),), layers="dense", also=("pre_mlp_layernorm.weight",)),
    WeightRow("mlp.linear_fc1.weight",
              (("mlp.gate_proj.weight", "intermediate hidden"), ("mlp.up_proj.weight", "intermediate hidden")),
              transform=ROWS, layers="dense"),
    WeightRow("mlp.linear_fc2.weight", (("mlp.down_proj.weight", "hidden intermediate"),), layers="dense"),
)  # fmt: skip
EXPERTS = (
    WeightRow("pre_mlp_layernorm.weight", (("mlp_norm.weight", "hidden"),), layers="moe", also=(MLP_NORM,)),
    WeightRow("mlp.router.weight", (("mlp.gate.weight", "experts hidden"),), layers="moe"),
    WeightRow("mlp.router.expert_bias", (("mlp.gate.e_score_correction_bias", "experts"),), layers="moe", exact=True,
              when="expert_bias"),
    WeightRow("mlp.experts.experts.linear_fc1.weight",
              (("mlp.experts.{expert}.gate_proj.weight", "expert hidden"),
               ("mlp.experts.{expert}.up_proj.weight", "expert hidden")), transform=ROWS, layers="moe"),
    WeightRow("mlp.experts.experts.linear_fc2.weight", (("mlp.experts.{expert}.down_proj.weight", "hidden expert"),),
              layers="moe"),
    WeightRow("mlp.shared_experts.linear_fc1.weight",
              (("mlp.shared_expert.gate_proj.weight", "shared_expert hidden"),
               ("mlp.shared_expert.up_proj.weight", "shared_expert hidden")),
              transform=ROWS, layers="moe", when="shared_expert"),
    WeightRow("mlp.shared_experts.linear_fc2.weight",
              (("mlp.shared_expert.down_proj.weight", "hidden shared_expert"),), layers="moe", when="shared_expert"),
    WeightRow("mlp.shared_experts.gate_weight", (("mlp.shared_expert_gate.weight", "one hidden"),), layers="moe",
              when="shared_expert_gate"),
)  # fmt: skip
PREDICTION = (
    WeightRow("enorm.weight", (("enorm.weight", "hidden"),), layers="mtp"),
    WeightRow("hnorm.weight", (("hnorm.weight", "hidden"),), layers="mtp"),
    WeightRow("eh_proj.weight", (("eh_proj.weight", "hidden two_hidden"),), layers="mtp"),
    WeightRow("final_layernorm.weight", (("norm.weight", "hidden"),), layers="mtp"),
)
AFTER_THE_LAYERS = (
    WeightRow("decoder.final_layernorm.weight", (("model.norm.weight", "hidden"),), layers=None,
              also=("decoder.final_norm.weight",)),
    WeightRow("output_layer.weight", (("lm_head.weight", "vocabulary hidden"),), layers=None, padded=True),
)  # fmt: skip

EXTRA_STATES = {
    "mom": ("input_layernorm", "self_attention.in_proj", "self_attention.out_proj"),
    "attention": ("input_layernorm", *(f"self_attention.{name}" for name in (
        "linear_qkv", "core_attention", "linear_proj", "q_layernorm", "k_layernorm"))),
    "latent": ("input_layernorm", *(f"self_attention.{name}" for name in (
        "linear_q_proj", "linear_q_down_proj", "linear_q_up_proj", "linear_kv_down_proj", "linear_kv_up_proj",
        "core_attention", "linear_proj", "q_layernorm", "kv_layernorm"))),
    "dense": ("pre_mlp_layernorm", "mlp.linear_fc1", "mlp.linear_fc2"),
    "moe": ("pre_mlp_layernorm", "mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2"),
    "expert": ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2"),
    "mtp": ("enorm", "hnorm", "eh_proj", "final_layernorm"),
    None: ("decoder.final_layernorm", "decoder.final_norm", "output_layer"),
}  # fmt: skip
"""Modules that read an ``_extra_state`` from a checkpoint (Transformer Engine's, for FP8), which is empty here."""


@dataclass(frozen=True)
class Place:
    """Where a Megatron tensor lies in a checkpoint: a name, and an index of each axis that the tensor's own axes follow
    there (layers, experts), with the axis's length."""

    name: str
    leading: tuple[tuple[int, int], ...] = ()


def places(layout: Layout, name: str, layer: int | None, kind: str | None, expert: int | None = None) -> list[Place]:
    """Where a checkpoint may hold what a layer calls ``name``: under the layer's own name, or stacked.

    Args:
        layer: index of the layer, those of multi-token prediction included; None outside the layers.
        kind: a word of `WeightRow.layers`.
        expert: whose slice to take.
    """
    experts = () if expert is None else ((expert, layout.num_experts),)
    if layer is None:
        return [Place(name)]
    part = int(kind in ("dense", "moe", "expert"))
    if layer >= layout.num_layers:
        own = f"mtp.layers.{layer - layout.num_layers}."
        inner = f"mtp_model_layer.layers.{part}." if layout.hybrid else "transformer_layer."
        return [Place(own + ("" if kind == "mtp" else inner) + name, experts)]
    if layout.hybrid:
        return [Place(f"decoder.layers.{2 * layer + part}.{name}", experts)]
    stacked = Place(f"decoder.layers.{name}", ((layer, layout.num_layers), *experts))
    return [Place(f"decoder.layers.{layer}.{name}", experts), stacked]


@dataclass(frozen=True)
class Entry:
    """A row of the table for one tensor of one model, or one expert's slice of a tensor. ``layer`` is None where the
    tensor is not a layer's."""

    row: WeightRow
    layer: int | None
    hf: tuple[tuple[str, tuple[int, ...]], ...]
    layout: Layout
    expert: int | None = None

    @property
    def hf_names(self) -> list[str]:
        return [name for name, _ in self.hf]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the Megatron tensor, without vocabulary padding."""
        return tuple(self.join([torch.empty(shape, device="meta") for _, shape in self.hf]).shape)

    @property
    def places(self) -> list[Place]:
        """Where a checkpoint may hold the tensor, under any of its names."""
        names = (self.row.megatron, *self.row.also)
        return [
            place for name in names for place in places(self.layout, name, self.layer, self.row.layers, self.expert)
        ]

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Hugging Face tensors of a Megatron tensor, in the order of ``hf``."""
        return list(self.row.transform.split(tensor, self.layout, len(self.hf)))

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The Megatron tensor of Hugging Face tensors in the order of ``hf``."""
        return self.row.transform.join(parts, self.layout)


def entries(layout: Layout) -> Iterator[Entry]:
    """Every tensor of a model, in the order of its layers: what comes before them, the layers, what comes after."""
    rows = weight_rows(get_rule(layout.memory_rule), alone=layout.num_memories == 0)
    rows = [row for row in rows if row.when in (None, *layout.options)]
    if layout.dims["width"] == 1:  # no convolutions
        rows = [row for row in rows if "width" not in row.hf[0][1].split()]
    yield from _model_entries(BEFORE_THE_LAYERS, layout)
    for layer, kinds in enumerate(zip(layout.mixers, layout.mlps, strict=True)):
        for row in rows:
            if row.layers in kinds or (row.layers == "mtp" and layer >= layout.num_layers):
                for expert in range(layout.num_experts) if row.per_expert else [None]:
                    yield _entry(row, layout, layer, expert)
    yield from _model_entries(AFTER_THE_LAYERS, layout)


def _model_entries(rows: Sequence[WeightRow], layout: Layout) -> Iterator[Entry]:
    for row in rows:
        if not (layout.tied and row.megatron == "output_layer.weight"):
            yield _entry(row, layout, None)


def _entry(row: WeightRow, layout: Layout, layer: int | None, expert: int | None = None) -> Entry:
    prefix = "" if layer is None else f"model.layers.{layer}."
    if layer is not None and layer >= layout.num_layers:
        prefix = f"model.mtp.{layer - layout.num_layers}." + ("" if row.layers == "mtp" else "layer.")
    names = []
    for name, dims in row.hf:
        shape = tuple(layout.dims[dim] for dim in dims.split())
        if "{memory}" in name:
            memories = 0 if layout.single_kv_proj else layout.num_memories
        elif ".shared_" in name and row.layers == "mom":
            memories = int(layout.shared_memory or layout.single_kv_proj)
        else:
            memories = 1
        names += [(prefix + name.format(memory=memory, expert=expert), shape) for memory in range(memories)]
    return Entry(row, layer, tuple(names), layout, expert)
