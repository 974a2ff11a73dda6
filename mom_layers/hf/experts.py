"""An MLP of experts, under the parameter names of Qwen2-MoE and DeepSeek-V3.

Shape legend: tokens N, hidden size D, experts E, experts that a token goes to k.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F

from mom_layers.hf.attention_and_mlp import GatedMLP
from mom_layers.hf.moe_config import MoeSpec


class ExpertRouter(nn.Module):
    """The router's logits [N, E] in float32 at least, and the choice of experts.

    The class is no linear layer of PyTorch, so that an adapter on all linear layers leaves the router as it is.

    With ``expert_bias`` the buffer `e_score_correction_bias` [E] is added to the scores for the choice alone. Nothing
    trains the buffer here: Megatron updates it by the experts' load.
    """

    def __init__(self, hidden_size: int, spec: MoeSpec):
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.empty(spec.num_experts, hidden_size))
        bias = torch.zeros(spec.num_experts, dtype=torch.float32) if spec.expert_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype))

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From logits [N, E]: the weights and the ids [N, k] of every token's experts."""
        spec, k = self.spec, self.spec.num_experts_per_tok
        if spec.score_function == "softmax" and spec.norm_topk_prob:
            scores, ids = self._best(logits)
            weights = scores.softmax(dim=1)
        elif spec.score_function == "softmax":
            weights, ids = self._best(logits.softmax(dim=1))
        else:
            scores = logits.sigmoid() if spec.score_function == "sigmoid" else F.softplus(logits).sqrt()
            biased = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
            ids = self._best(biased)[1]
            weights = scores.gather(1, ids)
            weights = weights / (weights.sum(dim=1, keepdim=True) + 1e-20) if k > 1 else weights
        return weights * spec.routed_scaling_factor, ids

    def balancing_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """E times the sum over experts of (mean score) x (share of choices): 1 when the experts are balanced.

        logits: [N, E] without padding.
        """
        scores, ids = logits.softmax(dim=1), self.choose(logits)[1]
        if self.spec.score_function != "softmax":
            scores = logits.sigmoid() if self.spec.score_function == "sigmoid" else F.softplus(logits).sqrt()
            scores = scores / scores.sum(dim=1, keepdim=True)
        chosen = torch.zeros_like(scores).scatter(1, ids, 1.0)
        return logits.shape[1] * (scores.mean(dim=0) * chosen.mean(dim=0)).sum() / ids.shape[1]

    def _best(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The k largest of scores [N, E], among the experts of the best groups where there are groups."""
        spec, k = self.spec, self.spec.num_experts_per_tok
        if spec.n_group is not None:
            grouped = scores.unflatten(1, (spec.n_group, -1))
            best = grouped.topk(k // spec.topk_group, dim=2).values.sum(dim=2).topk(spec.topk_group, dim=1).indices
            open_groups = torch.zeros_like(grouped[:, :, 0], dtype=torch.bool).scatter(1, best, True)
            scores = grouped.masked_fill(~open_groups[:, :, None], -torch.inf).flatten(1)
        return scores.topk(k, dim=1)


class SparseMLP(nn.Module):
    """``sum over a token's experts of weight * expert(x)``, and the shared expert's output."""

    def __init__(self, hidden_size: int, spec: MoeSpec):
        super().__init__()
        self.gate = ExpertRouter(hidden_size, spec)
        self.experts = nn.ModuleList(GatedMLP(hidden_size, spec.intermediate_size) for _ in range(spec.num_experts))
        if spec.shared_expert_intermediate_size is not None:
            self.shared_expert = GatedMLP(hidden_size, spec.shared_expert_intermediate_size)
        if spec.shared_expert_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, T, D]. Returns the output [B, T, D] and the router's logits [B T, E]."""
        tokens = x.flatten(0, 1)
        logits = self.gate(tokens)
        weights, ids = self.gate.choose(logits)
        out = torch.zeros_like(tokens)
        for expert in ids.unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            expert_out = self.experts[expert](tokens[token])
            weighted = expert_out.to(weights.dtype) * weights[token, choice, None]
            out = out.index_add(0, token, weighted.to(out.dtype))
        if hasattr(self, "shared_expert"):
            shared = self.shared_expert(tokens)
            if hasattr(self, "shared_expert_gate"):
                shared = shared * self.shared_expert_gate(tokens).sigmoid()
            out = out + shared
        return out.unflatten(0, x.shape[:2]), logits
