"""Models of flash-linear-attention whose token mixer is one memory: `gated_deltanet`, `gla`, `delta_net`.

A folder of such a type is the folder of a "mom" model with other keys in config.json and, for `gla`, other names of a
few tensors, where the blocks compute the same. A key with which a block of that type computes something else is
refused with the reason. No block of `kda` and `linear_attn` computes what a layer here does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linear_moe.conversion.files import ConversionError
from mom_layers.hf.fields import FIELDS, shown
from mom_layers.recur.rules import rule_names

SHARED_KEYS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "conv_size", "attn", "hidden_ratio",
    "intermediate_size", "hidden_act", "norm_eps", "initializer_range", "max_position_embeddings", "use_cache",
    "attnres_block_size",
)  # fmt: skip
"""Keys of the same meaning in every type and in ours."""
TOKENIZER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype", "torch_dtype")
EQUAL_HEADS = "a share of the keys for several heads has no counterpart in these layers"


@dataclass(frozen=True)
class Only:
    """A key of a type, the values with which the blocks are the same, the type's default, and why no others."""

    key: str
    accepted: tuple
    default: Any
    reason: str


@dataclass(frozen=True)
class Renamed:
    """A tensor of a layer under both names, and how one is made of the other; H heads."""

    ours: str
    theirs: str
    to_theirs: Callable[[Tensor, int], Tensor]
    to_ours: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class FlaType:
    """One `model_type` of flash-linear-attention.

    Attributes:
        rule: the update rule here.
        architecture: the class of the language model there.
        defaults: of the keys that the type and ours share, where they differ from ours.
        only: keys with which a block may compute something else.
        relative: sizes are given as ``expand_k`` and ``expand_v`` times the hidden size; elsewhere as ``head_dim``.
        renamed: tensors with other names.
    """

    rule: str
    architecture: str
    defaults: dict[str, Any]
    only: tuple[Only, ...]
    relative: bool = False
    renamed: tuple[Renamed, ...] = ()


def _same(tensor: Tensor, heads: int) -> Tensor:
    return tensor


def _one_of_all_heads(tensor: Tensor, heads: int) -> Tensor:
    first, *others = tensor.chunk(heads)
    if tensor.device.type != "meta" and any(not torch.equal(first, other) for other in others):
        raise ConversionError(
            "the decay of gla has a low-rank projection for each head here and one for all heads in FLA: after "
            "training they differ, and FLA's type cannot hold them. Export with --model-type mom"
        )
    return first


GLA_TENSORS = (
    Renamed("decay_proj.weight", "gk_proj.0.weight", _one_of_all_heads, lambda t, heads: t.repeat(heads, 1)),
    Renamed(
        "decay_up", "gk_proj.1.weight", lambda t, heads: t.transpose(1, 2).flatten(0, 1),
        lambda t, heads: t.unflatten(0, (heads, -1)).transpose(1, 2),
    ),
    Renamed("decay_bias", "gk_proj.1.bias", lambda t, heads: t.flatten(), lambda t, heads: t.unflatten(0, (heads, -1))),
    Renamed("o_norm.weight", "g_norm_swish_gate.weight", _same, _same),
)  # fmt: skip

TYPES = {
    "gated_deltanet": FlaType(
        "gated_deltanet", "GatedDeltaNetForCausalLM",
        {"num_heads": 6, "num_hidden_layers": 21, "expand_v": 2.0, "head_dim": 256},
        (
            Only("use_gate", (True,), True, "the output norm is gated here"),
            Only("allow_neg_eigval", (False,), False, "beta lies between 0 and 1 here"),
            Only("num_v_heads", (None, "num_heads"), None, EQUAL_HEADS),
            Only("use_short_conv", (True, False), True, ""),
        ),
    ),
    "gla": FlaType(
        "gla", "GLAForCausalLM", {"expand_k": 0.5, "expand_v": 1.0},
        (
            Only("use_short_conv", (True,), False, "without a convolution q, k and v go through no SiLU there, and "
                 "through SiLU here"),
            Only("num_kv_heads", (None, "num_heads"), None, EQUAL_HEADS),
            Only("feature_map", (None,), None, "q and k have no feature map here"),
            Only("clamp_min", (None,), None, "the decay has no lower bound here"),
            Only("use_output_gate", (True,), True, "the output norm is gated here"),
            Only("elementwise_affine", (True,), True, "the output norm has a weight here"),
            Only("fuse_norm", (True,), True, "the tensors have other names without"),
        ),
        relative=True, renamed=GLA_TENSORS,
    ),
    "delta_net": FlaType(
        "deltanet", "DeltaNetForCausalLM", {"num_heads": 16, "expand_k": 1.0, "expand_v": 1.0},
        (
            Only("use_gate", (True,), False, "the output norm is gated here"),
            Only("use_beta", (True,), True, "every token has a beta here"),
            Only("allow_neg_eigval", (False,), False, "beta lies between 0 and 1 here"),
            Only("qk_norm", ("l2",), "l2", "q and k have unit length here"),
            Only("qk_activation", ("silu",), "silu", "q and k go through SiLU here"),
            Only("use_short_conv", (True, False), True, ""),
        ),
        relative=True,
    ),
}  # fmt: skip
NEVER = {
    "kda": "its output gate is a sigmoid of a low-rank projection with a bias, and a SiLU of one matrix here",
    "linear_attn": "its layers have no convolutions and no output gate, and the layers here have both",
}
"""Types whose blocks are not ours, whatever their keys say."""


def is_fla_type(model_type: object) -> bool:
    """Whether config.json names a model of flash-linear-attention that this module reads, or refuses with a reason."""
    return isinstance(model_type, str) and model_type in (*TYPES, *NEVER)


def fla_type(model_type: str) -> FlaType:
    """Raises ConversionError for a type whose blocks are not ours, or whose rule is not registered."""
    if model_type in NEVER:
        raise ConversionError(f"model_type {model_type!r} cannot be converted: {NEVER[model_type]}")
    if model_type not in TYPES:
        raise ConversionError(f"--model-type must be mom or one of {', '.join(TYPES)}, got {shown(model_type)}")
    found = TYPES[model_type]
    if found.rule not in rule_names():
        raise ConversionError(f"model_type {model_type!r} needs the update rule {found.rule}, which is not registered")
    return found


def content_from_fla(content: dict) -> dict:
    """The content of a "mom" model's config.json that describes the same model as FLA's.

    Raises:
        ConversionError: a key with which the blocks are not the same.
    """
    kind = fla_type(content["model_type"])
    held = {field.name: field.default for field in FIELDS} | kind.defaults | content
    for only in kind.only:
        value = content.get(only.key, only.default)
        accepted = [held["num_heads"] if word == "num_heads" else word for word in only.accepted]
        if value not in accepted:
            raise ConversionError(
                f"config.json: {only.key} must be {' or '.join(map(shown, accepted))} for a model of type "
                f"{content['model_type']} to be converted, got {shown(value)}: {only.reason}"
            )
    ours = {key: held[key] for key in SHARED_KEYS} | {key: content[key] for key in TOKENIZER_KEYS if key in content}
    ours |= {"model_type": "mom", "mom_backend": kind.rule, "num_memories": 0, "topk": 0, "shared_mem": True}
    if not content.get("use_short_conv", next(o.default for o in kind.only if o.key == "use_short_conv")):
        ours["conv_size"] = 1
    return ours | (_relative_sizes(held) if kind.relative else {key: held[key] for key in ("head_dim", "expand_v")})


def _relative_sizes(held: dict) -> dict:
    hidden, heads = held["hidden_size"], held["num_heads"]
    try:
        keys, values = int(hidden * held["expand_k"]), int(hidden * held["expand_v"])
        if keys % heads or values % heads or keys <= 0:
            raise ValueError
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConversionError(
            f"config.json: hidden_size {shown(hidden)} times expand_k {shown(held['expand_k'])} and expand_v "
            f"{shown(held['expand_v'])} must divide by num_heads {shown(heads)}"
        ) from error
    return {"head_dim": keys // heads, "expand_v": values / keys}


def content_to_fla(content: dict, model_type: str) -> dict:
    """The content of FLA's config.json that describes the same model as that of a "mom" model.

    Raises:
        ConversionError: the model is not one memory of the type's rule, or the type cannot hold it.
    """
    kind = fla_type(model_type)
    if content["num_memories"] != 0:
        raise ConversionError(f"--model-type {model_type} holds one memory alone, and this model has routed memories")
    if content["mom_backend"] != kind.rule:
        raise ConversionError(
            f"--model-type {model_type} holds the update rule {kind.rule}, and this model has {content['mom_backend']}"
        )
    theirs = {key: content[key] for key in (*SHARED_KEYS, *TOKENIZER_KEYS) if key in content}
    theirs |= {only.key: only.accepted[0] for only in kind.only}
    theirs |= {"architectures": [kind.architecture], "model_type": model_type}
    if content["conv_size"] == 1:
        if False not in next(only.accepted for only in kind.only if only.key == "use_short_conv"):
            raise ConversionError(f"--model-type {model_type} has no SiLU without a convolution: --mom-conv-kernel 1")
        theirs |= {"use_short_conv": False, "conv_size": 4}
    if not kind.relative:
        return theirs | {key: content[key] for key in ("head_dim", "expand_v")}
    width = content["head_dim"] * content["num_heads"]
    return theirs | {
        "expand_k": width / content["hidden_size"],
        "expand_v": width * content["expand_v"] / content["hidden_size"],
    }


def _split(name: str) -> tuple[str, str]:
    """``model.layers.3.attn.`` and the rest; an empty first part for a tensor of another place."""
    before, found, after = name.partition(".attn.")
    return (before + found, after) if found else ("", name)


def tensor_to_fla(name: str, tensor: Tensor, model_type: str, heads: int) -> tuple[str, Tensor]:
    """A tensor of our format under FLA's name, in FLA's shape. Raises ConversionError where the type cannot hold it."""
    place, rest = _split(name)
    for renamed in fla_type(model_type).renamed:
        if place and rest == renamed.ours:
            return place + renamed.theirs, renamed.to_theirs(tensor, heads).contiguous()
    return name, tensor


class FlaWeights:
    """The tensors of FLA's folder under our names and in our shapes: what `linear_moe.conversion.weights.Weights`
    offers, of whose tensors this object is a view."""

    def __init__(self, weights, model_type: str, heads: int):
        self._weights, self._heads = weights, heads
        self._theirs: dict[str, tuple[str, Renamed | None]] = {}
        by_name = {renamed.theirs: renamed for renamed in fla_type(model_type).renamed}
        for name in weights.names():
            place, rest = _split(name)
            renamed = by_name.get(rest) if place else None
            self._theirs[name if renamed is None else place + renamed.ours] = (name, renamed)

    def names(self) -> set[str]:
        return set(self._theirs)

    def _ours(self, name: str, get: Callable[[str], Tensor]) -> Tensor:
        theirs, renamed = self._theirs[name]
        tensor = get(theirs)
        if renamed is None:
            return tensor
        try:
            return renamed.to_ours(tensor, self._heads).contiguous()
        except RuntimeError as error:
            raise ConversionError(f"{theirs} is {list(tensor.shape)}, which does not fit config.json") from error

    def describe(self, name: str) -> Tensor:
        return self._ours(name, self._weights.describe)

    def read(self, name: str) -> Tensor:
        return self._ours(name, self._weights.read)
