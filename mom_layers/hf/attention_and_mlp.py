"""Norm, MLP and softmax attention, under the parameter names of the Hugging Face format."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.hf.attention_config import AttentionSpec, LatentSpec
from mom_layers.hf.sequence import TokenSequence


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dimension, computed in float32 at least."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(x.dtype)


class HeadNorm(RMSNorm):
    """The output norm of a MoM layer. A call returns the weight [V], which the kernels apply to every head."""

    def forward(self) -> torch.Tensor:
        return self.weight


class GatedMLP(nn.Module):
    """``down(SiLU(gate x) * up x)``."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Attention(nn.Module):
    """Causal softmax attention with rotary embeddings and grouped queries: the softmax layers of a hybrid model."""

    def __init__(self, hidden_size: int, spec: AttentionSpec, eps: float):
        super().__init__()
        self.spec = spec
        queries, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(hidden_size, queries, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        if spec.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, eps)
            self.k_norm = RMSNorm(spec.head_dim, eps)
        self.o_proj = nn.Linear(queries, hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, sequence: TokenSequence, past: DynamicLayer | None = None
    ) -> tuple[torch.Tensor, None]:
        """x [B, T, D] follows the tokens in ``past``. Afterwards ``past`` holds the keys and values of x too.

        Returns out [B, T, D], and None in the place of a MoM layer's router logits.
        """
        spec = self.spec
        q, k, v = (linear(x).unflatten(2, (-1, spec.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        if spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # [B, heads, T, head_dim]
        if spec.rope_theta is not None:
            rotation = sequence.rotation(spec.rope_theta, spec.head_dim, compute_dtype(x.dtype), spec.rope_scaling)
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return self.o_proj(attend(q, k, v, sequence, past, spec.window_size)), None


class LatentAttention(nn.Module):
    """Multi-latent attention (arXiv 2405.04434), under the names of DeepSeek-V3. The cache holds keys and values."""

    def __init__(self, hidden_size: int, spec: LatentSpec, eps: float):
        super().__init__()
        self.spec = spec
        queries = spec.num_heads * spec.key_dim
        if spec.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden_size, spec.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(spec.q_lora_rank, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, spec.kv_lora_rank + spec.qk_rope_head_dim, bias=False)
        self.kv_b_proj = nn.Linear(
            spec.kv_lora_rank, spec.num_heads * (spec.qk_nope_head_dim + spec.v_head_dim), bias=False
        )
        if spec.qk_norm and spec.q_lora_rank is not None:
            self.q_a_layernorm = RMSNorm(spec.q_lora_rank, eps)
        if spec.qk_norm:
            self.kv_a_layernorm = RMSNorm(spec.kv_lora_rank, eps)
        self.o_proj = nn.Linear(spec.num_heads * spec.v_head_dim, hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, sequence: TokenSequence, past: DynamicLayer | None = None
    ) -> tuple[torch.Tensor, None]:
        """As :meth:`Attention.forward`."""
        spec = self.spec
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        if spec.q_lora_rank is None:
            q = self.q_proj(x)
        else:
            q = self.q_a_proj(x)
            q = self.q_b_proj(self.q_a_layernorm(q) if spec.qk_norm else q)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent) if spec.qk_norm else latent)
        q, kv = (part.unflatten(2, (spec.num_heads, -1)).transpose(1, 2) for part in (q, kv))
        q_plain, q_rope = q.split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
        k_plain, v = kv.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)

        scaling = spec.rope_scaling
        rotation = sequence.rotation(spec.rope_theta, spec.qk_rope_head_dim, compute_dtype(x.dtype), scaling)
        q_rope = rotate(_pairs_apart(q_rope), *rotation)
        k_rope = rotate(_pairs_apart(k_rope[:, None]), *rotation).expand(-1, spec.num_heads, -1, -1)
        q, k = torch.cat([q_plain, q_rope], dim=-1), torch.cat([k_plain, k_rope], dim=-1)
        scale = spec.key_dim**-0.5 * (1.0 if scaling is None else scaling.score_factor)
        return self.o_proj(attend(q, k, v, sequence, past, None, scale)), None


def softmax_attention(hidden_size: int, spec: AttentionSpec | LatentSpec, eps: float) -> nn.Module:
    """The layer that a specification describes."""
    return (LatentAttention if spec.latent else Attention)(hidden_size, spec, eps)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequence: TokenSequence,
    past: DynamicLayer | None,
    window: int | None,
    scale: float | None = None,
) -> torch.Tensor:
    """Causal attention of q [B, H, T, K] over the tokens in ``past``, and k [B, G, T, K], v [B, G, T, V].

    Returns [B, T, H V].
    """
    if past is not None:
        k, v = past.update(k, v)
    mask = sequence.attention_mask(k.shape[2], window)
    causal = mask is None and sequence.length > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def _pairs_apart(x: torch.Tensor) -> torch.Tensor:
    """DeepSeek's order of pairs to :func:`rotate`'s: the first numbers of all neighbouring pairs, then the second."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (x[i], x[i + width / 2]) of x [B, heads, T, width] by its angle."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
