"""The softmax layers of a hybrid model, as the configuration's `attn` entry describes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from numbers import Real

from mom_layers.hf.fields import LARGEST, shown
from mom_layers.hf.rotary import RopeScaling, parse_scaling


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention of some layers.

    Attributes:
        layers: their indices.
        num_heads: query heads.
        num_kv_heads: key and value heads; num_heads when absent.
        qkv_bias: biases on the query, key and value projections.
        window_size: tokens that a query sees, its own included; all earlier tokens when None.
        rope_theta: base of the rotary embedding; None for attention without positions.
        head_dim: width of a head; hidden_size / num_heads when absent.
        qk_norm: an RMSNorm over each head's query and key, before the rotation.
        rope_scaling: of the rotary embedding, or None.
    """

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    window_size: int | None = None
    rope_theta: float | None = 10000.0
    qk_norm: bool = False
    rope_scaling: RopeScaling | None = None

    latent = False


@dataclass(frozen=True)
class LatentSpec:
    """Multi-latent attention (arXiv 2405.04434) of some layers, with DeepSeek's names.

    Attributes:
        layers: their indices.
        num_heads: heads.
        q_lora_rank: width of the latent query; None for queries from the hidden state.
        kv_lora_rank: width of the latent that keys and values come from.
        qk_nope_head_dim, qk_rope_head_dim: parts of a head's key without and with positions.
        v_head_dim: width of a head's value.
        qk_norm: RMSNorms over the latents.
        rope_theta, rope_scaling: of the rotary embedding.
    """

    layers: tuple[int, ...]
    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    qk_norm: bool = True
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None

    latent = True
    window_size = None

    @property
    def key_dim(self) -> int:
        """Width of a head's key and query."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


LARGEST_BASE = 1e12  # of the rotary embedding: powers of the base stay finite in float32
KEYS = tuple(field.name for field in fields(AttentionSpec))
LATENT_KEYS = tuple(field.name for field in fields(LatentSpec))
LATENT_SIZES = ("num_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")


def parse_attention(attn: dict | list | None, hidden_size: int, num_layers: int) -> list[AttentionSpec | LatentSpec]:
    """Reads and checks the `attn` entry: None, one specification, or a list of them. A specification with
    ``kv_lora_rank`` is of multi-latent attention.

    Args:
        num_layers: those of the model, and the layers of multi-token prediction, which are numbered after them.

    Raises ValueError for an unknown key, a value of the wrong kind, sizes that do not divide, or a layer that does not
    exist or that is named twice.
    """
    if attn is None:
        return []
    entries = [attn] if isinstance(attn, dict) else attn
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"attn must be None, a dictionary or a list of dictionaries, got {shown(attn)}")
    specs = [
        _parse_latent(entry, num_layers) if "kv_lora_rank" in entry else _parse_entry(entry, hidden_size, num_layers)
        for entry in entries
    ]
    named = [layer for spec in specs for layer in spec.layers]
    twice = sorted(layer for layer, times in Counter(named).items() if times > 1)
    if twice:
        raise ValueError(f"attn names layers twice: {twice}")
    return specs


def _parse_entry(entry: dict, hidden_size: int, num_layers: int) -> AttentionSpec:
    _check_keys(entry, KEYS, ("layers", "num_heads"))
    heads = _positive(entry, "num_heads")
    kv_heads = heads if entry.get("num_kv_heads") is None else _positive(entry, "num_kv_heads")
    window = None if entry.get("window_size") is None else _positive(entry, "window_size")
    head_dim = None if entry.get("head_dim") is None else _positive(entry, "head_dim")
    theta = entry.get("rope_theta", 10000.0)
    if head_dim is None and (hidden_size % heads or (hidden_size // heads) % 2):
        raise ValueError(f"attn's num_heads must divide hidden_size into even widths, got {hidden_size} / {heads}")
    if head_dim is not None and head_dim % 2:
        raise ValueError(f"attn's head_dim must be even, got {head_dim}")
    if heads % kv_heads:
        raise ValueError(f"attn's num_kv_heads must divide num_heads, got {kv_heads} and {heads}")
    return AttentionSpec(
        layers=parse_layers(entry["layers"], num_layers, "attn's layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim or hidden_size // heads,
        qkv_bias=_truth(entry, "qkv_bias", False),
        window_size=window,
        rope_theta=None if theta is None else _base(theta),
        qk_norm=_truth(entry, "qk_norm", False),
        rope_scaling=parse_scaling(entry.get("rope_scaling")),
    )


def _parse_latent(entry: dict, num_layers: int) -> LatentSpec:
    _check_keys(entry, LATENT_KEYS, ("layers", *LATENT_SIZES))
    sizes = {name: _positive(entry, name) for name in LATENT_SIZES}
    if sizes["qk_rope_head_dim"] % 2:
        raise ValueError(f"attn's qk_rope_head_dim must be even, got {sizes['qk_rope_head_dim']}")
    return LatentSpec(
        layers=parse_layers(entry["layers"], num_layers, "attn's layers"),
        q_lora_rank=None if entry.get("q_lora_rank") is None else _positive(entry, "q_lora_rank"),
        qk_norm=_truth(entry, "qk_norm", True),
        rope_theta=_base(entry.get("rope_theta", 10000.0)),
        rope_scaling=parse_scaling(entry.get("rope_scaling")),
        **sizes,
    )


def _check_keys(entry: dict, known: tuple[str, ...], needed: tuple[str, ...]) -> None:
    unknown = sorted(set(entry) - set(known))
    if unknown:
        raise ValueError(f"attn has entries that are not supported: {', '.join(unknown)}; known are {', '.join(known)}")
    missing = [key for key in needed if entry.get(key) is None]
    if missing:
        raise ValueError(f"attn lacks {' and '.join(missing)}")


def parse_layers(layers: object, num_layers: int, name: str) -> tuple[int, ...]:
    """A list of layers' indices. Raises ValueError for anything else; ``name`` begins the message."""
    if not isinstance(layers, (list, tuple)) or not all(_is_integer(i) and 0 <= i < num_layers for i in layers):
        raise ValueError(f"{name} must be a list of numbers from 0 to {num_layers - 1}, got {shown(layers)}")
    return tuple(layers)


def _base(theta: object) -> float:
    if isinstance(theta, bool) or not isinstance(theta, Real) or not 0 < theta <= LARGEST_BASE:
        raise ValueError(f"attn's rope_theta must be a positive number, got {shown(theta)} (up to {LARGEST_BASE:g})")
    return float(theta)


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _truth(entry: dict, key: str, default: bool) -> bool:
    value = entry.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"attn's {key} must be true or false, got {shown(value)}")
    return value


def _positive(entry: dict, key: str) -> int:
    value = entry[key]
    if not _is_integer(value) or not 1 <= value <= LARGEST:
        raise ValueError(f"attn's {key} must be a positive whole number up to {LARGEST}, got {shown(value)}")
    return value
