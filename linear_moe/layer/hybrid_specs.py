"""MoM layers in the pattern of Megatron's hybrid models, where the letter G stands for linear attention."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as stack_with_transformer_engine
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


def hybrid_stack_spec(config: MomTransformerConfig, chosen: ModuleSpec | None) -> ModuleSpec:
    """Layers of a hybrid model with our token mixer for the letter G.

    Args:
        config: configuration of the model.
        chosen: the stack that the command line's --spec names, which keeps its other letters. None for Megatron's
            stack: all letters with Transformer Engine, ``* - E`` with --transformer-impl local, and multi-token
            prediction with both.
    """
    if chosen is None:
        chosen = _local_stack(config) if config.transformer_impl == "local" else stack_with_transformer_engine
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
    return replace(chosen, submodules=replace(chosen.submodules, gdn_layer=mom_layer))


class LocalHybridStack(HybridStack):
    """Megatron's HybridStack with a local last norm. Megatron's own last norm is always Transformer Engine's."""

    def __init__(self, config: MomTransformerConfig, *args, post_layer_norm: bool = True, **kwargs):
        super().__init__(config, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = input_norm(config)(config, config.hidden_size, config.layernorm_epsilon)


def _local_stack(config: MomTransformerConfig) -> ModuleSpec:
    """A stack of Megatron's local modules: softmax attention, MLP and MoE MLP, each a separate layer."""

    def parts(num_experts):
        whole = get_gpt_layer_local_spec(
            num_experts=num_experts,
            normalization=config.normalization,
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
        ).submodules
        norm = {"pre_mlp_layernorm": input_norm(config), "mlp": whole.mlp, "mlp_bda": whole.mlp_bda}
        return whole, TransformerLayerSubmodules(**norm)

    whole, mlp = parts(None)
    _, experts = parts(config.num_moe_experts or 1)
    attention = TransformerLayerSubmodules(
        input_layernorm=input_norm(config), self_attention=whole.self_attention, self_attn_bda=whole.self_attn_bda
    )
    return ModuleSpec(
        module=LocalHybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
            moe_layer=ModuleSpec(module=MoETransformerLayer, submodules=experts),
            mtp_block_spec=_local_prediction(config),
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
