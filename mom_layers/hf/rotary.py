"""Frequencies of the rotary embedding (arXiv 2104.09864), and how they are changed for longer texts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real

import torch

from mom_layers.hf.fields import shown

KINDS = {
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    ),
}  # fmt: skip
"""The kinds of scaling, and the keys of each."""
LARGEST = 1e9


@dataclass(frozen=True)
class RopeScaling:
    """The entry `rope_scaling` of softmax layers, with the defaults of transformers.

    Attributes:
        rope_type: "llama3" or "yarn" (arXiv 2309.00071).
        factor: by how much texts are longer than those of the first training.
        original_max_position_embeddings: tokens of a text of the first training.
        low_freq_factor, high_freq_factor: of llama3.
        beta_fast, beta_slow: of yarn.
        mscale, mscale_all_dim: of yarn, as in DeepSeek-V2: factors of the rotation and of the attention scores.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def rotation_factor(self) -> float:
        """What the cosines and sines are multiplied by."""
        if self.rope_type != "yarn":
            return 1.0
        return _magnitude(self.factor, self.mscale) / _magnitude(self.factor, self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """What latent attention multiplies its scores by."""
        return _magnitude(self.factor, self.mscale_all_dim) ** 2 if self.rope_type == "yarn" else 1.0


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def parse_scaling(content: dict | None) -> RopeScaling | None:
    """The entry `rope_scaling`. Raises ValueError for another kind, or keys and values that a kind does not have."""
    if content is None:
        return None
    if not isinstance(content, dict):
        raise ValueError(f"attn's rope_scaling must be null or a dictionary, got {shown(content)}")
    kind = content.get("rope_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"attn's rope_scaling must have a rope_type of {' or '.join(KINDS)}, got {shown(kind)}")
    if unknown := sorted(map(str, content.keys() - {"rope_type", *KINDS[kind]})):
        raise ValueError(f"attn's rope_scaling has {', '.join(unknown)}; known are {', '.join(KINDS[kind])}")
    if "factor" not in content:
        raise ValueError("attn's rope_scaling lacks factor")
    for key in KINDS[kind]:
        value, least = content.get(key, 1.0), 0.0 if key.startswith("mscale") else 1e-6
        if isinstance(value, bool) or not isinstance(value, Real) or not least <= value <= LARGEST:
            raise ValueError(f"attn's rope_scaling must have a positive {key} up to {LARGEST:g}, got {shown(value)}")
    return RopeScaling(**content)


def scaling_entry(scaling: RopeScaling) -> dict:
    """The content of config.json that :func:`parse_scaling` reads."""
    names = ("rope_type", *KINDS[scaling.rope_type])
    return {field.name: getattr(scaling, field.name) for field in fields(scaling) if field.name in names}


def frequencies(
    theta: float, width: int, scaling: RopeScaling | None, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Angle [width / 2] by which each pair of numbers turns from one token to the next."""
    exponents = torch.arange(0, width, 2, device=device, dtype=dtype) / width
    plain = theta**-exponents
    if scaling is None:
        return plain
    length, stretched = scaling.original_max_position_embeddings, plain / scaling.factor
    if scaling.rope_type == "llama3":
        # Few turns in the first training's texts: stretched. Many turns: as before. Between them: a mixture.
        turns = length * plain / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        first, last = (_pair_with(turns, theta, width, length) for turns in (scaling.beta_fast, scaling.beta_slow))
        first, last = max(math.floor(first), 0), min(math.ceil(last), width - 1)
        ramp = torch.arange(width // 2, device=device, dtype=dtype) - first
        kept = 1 - (ramp / max(last - first, 1e-3)).clamp(0, 1)
    return stretched * (1 - kept) + plain * kept


def _pair_with(turns: float, theta: float, width: int, length: int) -> float:
    """The pair of numbers, as a fraction, that turns so often in ``length`` tokens."""
    return width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
