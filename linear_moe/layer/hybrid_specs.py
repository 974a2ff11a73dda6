"""The layers of Megatron's hybrid models, a spec for each symbol of the pattern, with MoM layers for the symbol R."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack_with_transformer_engine
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from linear_moe.config import MomTransformerConfig
from linear_moe.layer.decoder_layers import input_norm, mixer_spec
from linear_moe.layer.memory_symbol import MemoryStackSubmodules


def hybrid_stack_spec(config: MomTransformerConfig, chosen: ModuleSpec | None) -> ModuleSpec:
    """Layers of a hybrid model with our token mixer for the symbol R.

    Args:
        config: configuration of the model.
        chosen: the stack that the command line's --spec names, which keeps its other symbols. None for Megatron's
            stack: all symbols with Transformer Engine, all but M and D with --transformer-impl local, and multi-token
            prediction with both. The norms of queries and keys are those of the configuration, as in a GPTModel.
    """
    if chosen is None:
        chosen = _local_stack(config) if config.transformer_impl == "local" else _transformer_engine_stack(config)
    ours = mixer_spec(config)
    mom_layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=ours.norm,
            self_attention=ours.mixer,
            self_attn_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=ours.keys,
        ),
    )
    return replace(chosen, submodules=MemoryStackSubmodules.beside(chosen.submodules, mom_layer))


def _transformer_engine_stack(config: MomTransformerConfig) -> ModuleSpec:
    """Megatron's stack, whose softmax layers have no norms of queries and keys, with the norms that a GPTModel has."""
    stack = stack_with_transformer_engine
    if not (config.qk_layernorm or config.qk_l2_norm):
        return stack

    def with_norms(layer: ModuleSpec, multi_latent: bool) -> ModuleSpec:
        whole = get_gpt_layer_with_transformer_engine_spec(
            multi_latent_attention=multi_latent,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm and not multi_latent,
        ).submodules
        return replace(layer, submodules=replace(layer.submodules, self_attention=whole.self_attention))

    layers = {"attention_layer": with_norms(stack.submodules.attention_layer, False)}
    if hasattr(stack.submodules, "mla_layer"):
        layers["mla_layer"] = with_norms(stack.submodules.mla_layer, True)
    return replace(stack, submodules=replace(stack.submodules, **layers))


class LocalHybridStack(HybridStack):
    """Megatron's HybridStack with a local last norm. Megatron's own last norm is always Transformer Engine's."""

    def __init__(self, config: MomTransformerConfig, *args, post_layer_norm: bool = True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = input_norm(config)(config, config.hidden_size, config.layernorm_epsilon)


def _local_stack(config: MomTransformerConfig) -> ModuleSpec:
    """A stack of Megatron's local modules: softmax attention of both kinds, Megatron's gated delta net, MLP and MoE
    MLP, each a separate layer.

    The names in a checkpoint are those of Transformer Engine's layers, where a norm is a part of the projection after
    the norm.
    """
    norm = input_norm(config)

    def whole(num_experts=None, multi_latent=False):
        return get_gpt_layer_local_spec(
            num_experts=num_experts,
            normalization=config.normalization,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm and not multi_latent,
            multi_latent_attention=multi_latent,
        ).submodules

    def mixer(self_attention, names):
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=self_attention,
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map=names,
            ),
        )

    def mlp(module, num_experts, names):
        of = whole(num_experts)
        return ModuleSpec(
            module=module,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=norm, mlp=of.mlp, mlp_bda=of.mlp_bda, sharded_state_dict_keys_map=names
            ),
        )

    submodules = HybridStackSubmodules(
        attention_layer=mixer(whole().self_attention, {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}),
        gdn_layer=mixer(_local_gated_delta_net(config), {"input_layernorm.": "self_attention.in_proj.layer_norm_"}),
        mlp_layer=mlp(MLPLayer, None, {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}),
        moe_layer=mlp(MoETransformerLayer, config.num_moe_experts or 1, {}),
        mtp_block_spec=_local_prediction(config),
    )
    if hasattr(submodules, "mla_layer"):  # core_v0.18 has no such layer
        submodules.mla_layer = mixer(whole(multi_latent=True).self_attention, {})
    return ModuleSpec(module=LocalHybridStack, submodules=submodules)


def _local_gated_delta_net(config: MomTransformerConfig) -> ModuleSpec:
    """Megatron's own gated delta net, the symbol G, with local linear layers."""
    local = LocalSpecProvider()
    return ModuleSpec(
        module=GatedDeltaNet,
        submodules=GatedDeltaNetSubmodules(
            in_proj=local.column_parallel_linear(), out_norm=input_norm(config), out_proj=local.row_parallel_linear()
        ),
    )


def _local_prediction(config: MomTransformerConfig) -> ModuleSpec:
    """Multi-token prediction with local modules. Its layers are a stack of the letters behind "/" in the pattern."""
    norm = input_norm(config)
    layer = MultiTokenPredictionLayerSubmodules(
        enorm=norm,
        hnorm=norm,
        eh_proj=LocalSpecProvider().column_parallel_linear(),
        mtp_model_layer=None,
        layer_norm=norm,
    )
    layers = [ModuleSpec(module=MultiTokenPredictionLayer, submodules=layer)]
    submodules = MultiTokenPredictionBlockSubmodules(layer_specs=layers)
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=submodules)
