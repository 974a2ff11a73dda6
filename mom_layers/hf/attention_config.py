"""The softmax layers of a hybrid model, as the configuration's `attn` entry describes them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields
from numbers import Real

from mom_layers.hf.fields import LARGEST, shown


@dataclass(frozen=True)
class AttentionSpec:
    """Softmax attention of some layers.

    Attributes:
        layers: their indices.
        num_heads: query heads; each is hidden_size / num_heads wide.
        num_kv_heads: key and value heads; num_heads when absent.
        qkv_bias: biases on the query, key and value projections.
        window_size: tokens that a query sees, its own included; all earlier tokens when None.
        rope_theta: base of the rotary embedding.
    """

    layers: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    qkv_bias: bool = False
    window_size: int | None = None
    rope_theta: float = 10000.0


LARGEST_BASE = 1e12  # of the rotary embedding: powers of the base stay finite in float32
KEYS = tuple(field.name for field in fields(AttentionSpec))


def parse_attention(attn: dict | list | None, hidden_size: int, num_hidden_layers: int) -> list[AttentionSpec]:
    """Reads and checks the `attn` entry: None, one specification, or a list of them.

    Raises ValueError for an unknown key, a value of the wrong kind, sizes that do not divide, or a layer that does not
    exist or that is named twice.
    """
    if attn is None:
        return []
    entries = [attn] if isinstance(attn, dict) else attn
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"attn must be None, a dictionary or a list of dictionaries, got {shown(attn)}")
    specs = [_parse_entry(entry, hidden_size, num_hidden_layers) for entry in entries]
    named = [layer for spec in specs for layer in spec.layers]
    twice = sorted(layer for layer, times in Counter(named).items() if times > 1)
    if twice:
        raise ValueError(f"attn names layers twice: {twice}")
    return specs


def _parse_entry(entry: dict, hidden_size: int, num_hidden_layers: int) -> AttentionSpec:
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise ValueError(f"attn has entries that are not supported: {', '.join(unknown)}; known are {', '.join(KEYS)}")
    missing = [key for key in ("layers", "num_heads") if entry.get(key) is None]
    if missing:
        raise ValueError(f"attn lacks {' and '.join(missing)}")

    heads = _positive(entry, "num_heads")
    kv_heads = heads if entry.get("num_kv_heads") is None else _positive(entry, "num_kv_heads")
    window = None if entry.get("window_size") is None else _positive(entry, "window_size")
    layers, bias, theta = entry["layers"], entry.get("qkv_bias", False), entry.get("rope_theta", 10000.0)
    if not isinstance(layers, (list, tuple)) or not all(_is_integer(i) and 0 <= i < num_hidden_layers for i in layers):
        raise ValueError(
            f"attn's layers must be a list of numbers from 0 to {num_hidden_layers - 1}, got {shown(layers)}"
        )
    if not isinstance(bias, bool):
        raise ValueError(f"attn's qkv_bias must be true or false, got {shown(bias)}")
    if isinstance(theta, bool) or not isinstance(theta, Real) or not 0 < theta <= LARGEST_BASE:
        raise ValueError(f"attn's rope_theta must be a positive number, got {shown(theta)} (up to {LARGEST_BASE:g})")
    if hidden_size % heads or (hidden_size // heads) % 2:
        raise ValueError(f"attn's num_heads must divide hidden_size into even widths, got {hidden_size} / {heads}")
    if heads % kv_heads:
        raise ValueError(f"attn's num_kv_heads must divide num_heads, got {kv_heads} and {heads}")
    return AttentionSpec(tuple(layers), heads, kv_heads, bias, window, float(theta))


def _is_integer(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _positive(entry: dict, key: str) -> int:
    value = entry[key]
    if not _is_integer(value) or not 1 <= value <= LARGEST:
        raise ValueError(f"attn's {key} must be a positive whole number up to {LARGEST}, got {shown(value)}")
    return value
