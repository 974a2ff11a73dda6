"""Folders of Transformers that exist (Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen-MoE) as models of this format, all of
whose layers are softmax attention: other names for the same tensors, and the same logits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from linear_moe.conversion.config import layout_of, parse_config
from linear_moe.conversion.digests import listed
from linear_moe.conversion.files import ConversionError
from linear_moe.conversion.loading import check_counts
from linear_moe.conversion.names import entries
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.fields import shown
from mom_layers.hf.rotary import KINDS as SCALING_KINDS


class Tensors(Protocol):
    """Tensors by name, each read when asked for; `linear_moe.conversion.weights.Weights` is one."""

    def names(self) -> set[str]: ...

    def describe(self, name: str) -> torch.Tensor: ...

    def read(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Architecture:
    """What one architecture of transformers has.

    Attributes:
        qkv_bias: biases on queries, keys and values: always (True), never (False), or as the configuration's
            attention_bias says (None), which then has a bias on the output too.
        qk_norm: RMSNorm over every head's query and key.
        experts: how the configuration describes experts; None for an architecture without.
        mixtral_names: experts have Mixtral's names.
    """

    qkv_bias: bool | None = None
    qk_norm: bool = False
    experts: Callable[[Any], dict] | None = None
    mixtral_names: bool = False


def _mixtral_experts(config) -> dict:
    return {
        "layers": list(range(config.num_hidden_layers)),
        "num_experts": config.num_local_experts,
        "intermediate_size": config.intermediate_size,
        "norm_topk_prob": True,
    }


def _qwen_experts(config) -> dict:
    every, dense = config.decoder_sparse_step, set(config.mlp_only_layers or [])
    layers = [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % every == 0]
    shared = getattr(config, "shared_expert_intermediate_size", None)
    return {
        "layers": layers,
        "num_experts": config.num_experts,
        "intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "shared_expert_intermediate_size": shared,
        "shared_expert_gate": shared is not None,
    }


ARCHITECTURES = {
    "llama": Architecture(),
    "mistral": Architecture(qkv_bias=False),
    "qwen2": Architecture(qkv_bias=True),
    "qwen3": Architecture(qk_norm=True),
    "mixtral": Architecture(qkv_bias=False, experts=_mixtral_experts, mixtral_names=True),
    "qwen2_moe": Architecture(qkv_bias=True, experts=_qwen_experts),
    "qwen3_moe": Architecture(qk_norm=True, experts=_qwen_experts),
}
NAMES = (
    ("model.embeddings.", "model.embed_tokens."),
    (".attn_norm.", ".input_layernorm."),
    (".mlp_norm.", ".post_attention_layernorm."),
    (".attn.", ".self_attn."),
)
"""Parts of names here, and what transformers calls them."""
MIXTRAL_NAMES = (
    (r"\.mlp\.gate\.", ".block_sparse_moe.gate."),
    (r"\.mlp\.experts\.(\d+)\.gate_proj\.", r".block_sparse_moe.experts.\1.w1."),
    (r"\.mlp\.experts\.(\d+)\.up_proj\.", r".block_sparse_moe.experts.\1.w3."),
    (r"\.mlp\.experts\.(\d+)\.down_proj\.", r".block_sparse_moe.experts.\1.w2."),
)
COUNTS = ("num_hidden_layers", "num_experts", "num_local_experts")
COMPUTED_WEIGHT = re.compile(r"rotary_emb\.inv_freq$")
"""Tensors of old folders that follow from the configuration."""


@dataclass
class RenamedTensors:
    """Tensors under other names.

    Attributes:
        source: the tensors under their own names.
        own: name here -> name in ``source``.
    """

    source: Tensors
    own: dict[str, str] = field(default_factory=dict)

    def names(self) -> set[str]:
        return set(self.own)

    def describe(self, name: str) -> torch.Tensor:
        return self.source.describe(self.own[name])

    def read(self, name: str) -> torch.Tensor:
        return self.source.read(self.own[name])


def is_transformer(content: dict) -> bool:
    """Whether a configuration is of an architecture that :func:`softmax_model` takes."""
    kind = content.get("model_type")
    return isinstance(kind, str) and kind in ARCHITECTURES


def softmax_model(content: dict, weights: Tensors) -> tuple[MomConfig, RenamedTensors]:
    """A Transformer as a model of this format, all of whose layers are softmax attention.

    Args:
        content: of its config.json.
        weights: its tensors.

    Raises ConversionError for a Transformer with something that the format lacks, or with other tensors than its
    configuration says.
    """
    check_counts({key: content.get(key) for key in COUNTS}, weights)
    config = parse_config(_content(content), set())
    expected = {name for entry in entries(layout_of(config)) for name in entry.hf_names}
    names = {name: _source_name(name, ARCHITECTURES[content["model_type"]]) for name in expected}
    held = {name for name in weights.names() if not COMPUTED_WEIGHT.search(name)}
    held -= {"lm_head.weight"} if config.tie_word_embeddings else set()
    if missing := set(names.values()) - held:
        raise ConversionError(f"the weights lack {listed(missing)}, which config.json describes")
    if unknown := held - set(names.values()):
        raise ConversionError(f"the weights have {listed(unknown)}, which config.json does not describe")
    return config, RenamedTensors(weights, names)


def _source_name(name: str, architecture: Architecture) -> str:
    for here, there in NAMES:
        name = name.replace(here, there)
    for here, there in MIXTRAL_NAMES if architecture.mixtral_names else ():
        name = re.sub(here, there, name)
    return name


def _content(content: dict) -> dict:
    """The content of config.json in this format."""
    from transformers import AutoConfig

    kind = content["model_type"]
    architecture = ARCHITECTURES[kind]
    try:
        config = AutoConfig.for_model(**content)
    except Exception as error:  # any of transformers' own
        raise ConversionError(f"config.json cannot be used: {type(error).__name__}: {error}") from error
    accepted = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,), "use_sliding_window": (False,)}
    accepted |= {"attention_bias": (False,)} if architecture.qkv_bias is None else {}
    for key, values in accepted.items():
        if getattr(config, key, values[0]) not in values:
            raise ConversionError(
                f"config.json: {key} must be {' or '.join(map(str, values)).lower()} to become a model with memories, "
                f"got {shown(getattr(config, key))}"
            )
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    theta, scaling = _rotation(content, config)
    attention = {
        "layers": list(range(layers)),
        "num_heads": heads,
        "num_kv_heads": config.num_key_value_heads or heads,
        "qkv_bias": bool(architecture.qkv_bias),
        "rope_theta": theta,
        "window_size": getattr(config, "sliding_window", None) if kind in ("mistral", "mixtral") else None,
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention |= {"head_dim": head_dim} if head_dim * heads != config.hidden_size else {}
    attention |= {"qk_norm": True} if architecture.qk_norm else {}
    attention |= {"rope_scaling": scaling} if scaling is not None else {}
    found = {
        "model_type": "mom",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "attn": attention,
    }
    found |= {key: content.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    experts = architecture.experts(config) if architecture.experts else {"layers": []}
    if experts["layers"]:
        per_token = config.num_experts_per_tok
        coefficient = float(config.router_aux_loss_coef or 0.0) * per_token / len(experts["layers"])
        found["moe"] = experts | {"num_experts_per_tok": per_token, "aux_loss_scale": float(f"{coefficient:.12g}")}
    return found


def _rotation(content: dict, config) -> tuple[float, dict | None]:
    """Base of the rotary embedding, and its `rope_scaling` entry. Raises ConversionError for a kind that is not known.

    transformers 5 has both in `rope_parameters`; transformers 4 has `rope_theta` and `rope_scaling`.
    """
    found = dict(content.get("rope_parameters") or content.get("rope_scaling") or {})
    theta = found.pop("rope_theta", None) or content.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    if kind == "default":
        return float(theta), None
    if kind != "llama3":
        raise ConversionError(f"config.json: rope_scaling must be null or of rope_type llama3, got {shown(kind)}")
    keys = SCALING_KINDS["llama3"]
    return float(theta), {"rope_type": kind} | {key: found[key] for key in keys if key in found}
