"""The memory router: Megatron's TopKRouter on a configuration whose experts are the memories."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker, set_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from linear_moe.config import MomTransformerConfig
from linear_moe.watching.metrics import memory_metrics


def router_config(config: MomTransformerConfig) -> MomTransformerConfig:
    """The router's configuration: memories in the place of experts, without the expert settings of the model."""
    memories = copy.copy(config)
    memories.num_moe_experts = config.mom_num_memories
    memories.moe_router_topk = config.mom_topk
    memories.moe_router_load_balancing_type = "aux_loss" if config.mom_aux_loss_coeff else "none"
    memories.moe_aux_loss_coeff = config.mom_aux_loss_coeff
    memories.moe_z_loss_coeff = config.mom_z_loss_coeff
    memories.moe_router_score_function = "softmax"
    memories.moe_router_dtype = "fp32"
    memories.moe_router_pre_softmax = False
    memories.moe_router_num_groups = None
    memories.moe_router_group_topk = None
    memories.moe_router_topk_scaling_factor = None
    memories.moe_router_enable_expert_bias = False
    memories.moe_router_force_load_balancing = False
    memories.moe_router_force_biased = None
    memories.moe_router_fusion = False
    memories.moe_enable_routing_replay = False
    memories.moe_expert_capacity_factor = None
    memories.moe_input_jitter_eps = None
    memories.add_bias_linear = False
    return memories


def router_groups(pg_collection: ProcessGroupCollection, sequence_parallel: bool) -> ProcessGroupCollection:
    """Process groups over which tokens are split, as the router's losses count tokens.

    Without sequence parallelism every tensor-parallel rank has the same tokens. A sum over these ranks would divide the
    gradient of the losses by the number of ranks.
    """
    if sequence_parallel:
        return pg_collection
    groups = copy.copy(pg_collection)
    groups.tp_cp = pg_collection.cp
    groups.tp_dp_cp = pg_collection.dp_cp
    return groups


@contextmanager
def _record_as_memories():
    """Sends the router's losses to the memories' tracker, apart from the losses of the model's experts."""
    experts = get_moe_metrics_tracker()
    set_moe_metrics_tracker(memory_metrics().losses)
    try:
        yield
    finally:
        set_moe_metrics_tracker(experts)


class MemoryRouter(TopKRouter):
    """Routes tokens to memories (MoM, eq. 5 and 6): top-k of softmax(x Wr), renormalised, in float32."""

    def __init__(self, config: MomTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection):
        super().__init__(router_config(config), router_groups(pg_collection, config.sequence_parallel))
        self.set_layer_number(layer_number)
        # finalize_model_grads updates the expert bias of every module without this attribute.
        self.frozen_expert_bias = True
        self.local_tokens_per_expert = torch.zeros(1)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states [s, b, h]. Returns weights [s, b, k] in float32 and memory ids [s, b, k]."""
        with _record_as_memories():
            probabilities, routing_map = super().forward(hidden_states)
        ids = routing_map.int().topk(self.topk, dim=-1).indices
        shape = (*hidden_states.shape[:2], self.topk)
        return probabilities.gather(1, ids).float().view(shape), ids.view(shape)

    def routing(self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None):
        probabilities, routing_map = super().routing(logits, padding_mask)
        if self.training and torch.is_grad_enabled():
            memory_metrics().record_routing(self.layer_number, routing_map, logits.view(routing_map.shape))
        return probabilities, routing_map
