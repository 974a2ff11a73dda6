"""The layers of a model: a token mixer and an MLP; and the layers of multi-token prediction, which are only kept."""

from __future__ import annotations

import torch
import torch.nn as nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mom_layers.hf.attention_and_mlp import GatedMLP, RMSNorm, softmax_attention
from mom_layers.hf.cache import MomCache
from mom_layers.hf.configuration_mom import MomConfig
from mom_layers.hf.experts import SparseMLP
from mom_layers.hf.mixer import token_mixer
from mom_layers.hf.sequence import TokenSequence


class MomBlock(GradientCheckpointingLayer):
    """``x + mixer(norm(x))``, then ``x + mlp(norm(x))``; the mixer is a MoM layer or softmax attention, and the MLP has
    experts or none."""

    def __init__(self, config: MomConfig, layer_idx: int):
        super().__init__()
        attention, moe = config.attention_of(layer_idx), config.moe_spec()
        self.layer_idx = layer_idx
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if attention is None:
            self.attn = token_mixer(config, layer_idx)
        else:
            self.attn = softmax_attention(config.hidden_size, attention, config.norm_eps)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        if moe is not None and layer_idx in moe.layers:
            self.mlp = SparseMLP(config.hidden_size, moe)
        else:
            self.mlp = GatedMLP(config.hidden_size, config.mlp_size)

    def forward(
        self, hidden_states: torch.Tensor, sequence: TokenSequence, cache: MomCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states [B, T, D]. Returns the layer's hidden states, a MoM layer's router logits [B * T, M], and the
        logits [B * T, E] of the experts' router."""
        past = None if cache is None else cache.layers[self.layer_idx]
        mixed, router_logits = self.attn(self.attn_norm(hidden_states), sequence, past)
        hidden_states = hidden_states + mixed
        out, expert_logits = self.mlp(self.mlp_norm(hidden_states)), None
        if isinstance(out, tuple):
            out, expert_logits = out
        return hidden_states + out, router_logits, expert_logits


class PredictionLayer(nn.Module):
    """A layer of multi-token prediction (arXiv 2412.19437). Its weights are kept, frozen, for training with Megatron;
    no model here computes with the layer."""

    def __init__(self, config: MomConfig, layer_idx: int):
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layer = MomBlock(config, layer_idx)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.requires_grad_(False)
