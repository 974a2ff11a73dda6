"""Norm, MLP and softmax attention, under the parameter names of the Hugging Face format."""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers.cache_utils import DynamicLayer

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.hf.attention_config import AttentionSpec
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

    def __init__(self, hidden_size: int, spec: AttentionSpec):
        super().__init__()
        self.head_dim = hidden_size // spec.num_heads
        self.window_size = spec.window_size
        self.rope_theta = spec.rope_theta
        kv_size = spec.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, kv_size, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, sequence: TokenSequence, past: DynamicLayer | None = None
    ) -> tuple[torch.Tensor, None]:
        """x [B, T, D] follows the tokens in ``past``. Afterwards ``past`` holds the keys and values of x too.

        Returns out [B, T, D], and None in the place of a MoM layer's router logits.
        """
        q, k, v = (
            linear(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotation = sequence.rotation(self.rope_theta, self.head_dim, compute_dtype(x.dtype))
        q, k = rotate(q, *rotation), rotate(k, *rotation)
        if past is not None:
            k, v = past.update(k, v)
        mask = sequence.attention_mask(k.shape[2], self.window_size)
        causal = mask is None and sequence.length > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns each pair (x[i], x[i + width / 2]) of x [B, heads, T, width] by its angle."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
