"""The layers of a model as Megatron's specs: its own decoder layers, with the token mixer of some replaced."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from linear_moe.config import MomTransformerConfig
from linear_moe.layer.mixer import MomTokenMixer, MomTokenMixerSubmodules
from linear_moe.layer.norm import TorchNorm


def _backend(config: MomTransformerConfig):
    if config.transformer_impl != "transformer_engine":
        return LocalSpecProvider()
    if not HAVE_TE:
        raise ValueError("--transformer-impl transformer_engine: Transformer Engine is not installed; use local")
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def _norm(builder):
    return TorchNorm if builder is WrappedTorchNorm else builder


def _layer_ids(config: MomTransformerConfig, vp_stage: int | None, count: int) -> list[int]:
    """Indices of the layers that this pipeline stage holds, among all layers of the model."""
    if config.pipeline_model_parallel_layout is not None:
        return config.pipeline_model_parallel_layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    return list(range(first, first + count))


def mom_mixer_spec(config: MomTransformerConfig) -> ModuleSpec:
    """The token mixer, with Transformer Engine's or local linear layers."""
    backend = _backend(config)
    return ModuleSpec(
        module=MomTokenMixer,
        submodules=MomTokenMixerSubmodules(
            in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear()
        ),
    )


def input_norm(config: MomTransformerConfig):
    """The norm before a layer, as a separate module."""
    rms_norm = config.normalization == "RMSNorm"
    return _norm(_backend(config).layer_norm(rms_norm=rms_norm, for_qk=False, has_residual=True))


def mom_block_spec(config: MomTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder layers of this pipeline stage: Megatron's own layers for the configuration (Transformer Engine's or local
    modules, dense or MoE MLPs), with Mixture-of-Memories as the token mixer of the layers in
    ``config.mom_layer_pattern``.
    """
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    mixer, norm = mom_mixer_spec(config), input_norm(config)
    pattern = config.mom_layer_pattern()
    layers = []
    for layer_id, layer in zip(_layer_ids(config, vp_stage, len(block.layer_specs)), block.layer_specs, strict=True):
        submodules = replace(
            layer.submodules,
            input_layernorm=_norm(layer.submodules.input_layernorm),
            pre_mlp_layernorm=_norm(layer.submodules.pre_mlp_layernorm),
        )
        if pattern[layer_id]:
            keys = submodules.sharded_state_dict_keys_map
            submodules = replace(
                submodules,
                input_layernorm=norm,
                self_attention=mixer,
                # The norm is a module of the layer. In Megatron's attention layers a fused projection holds the norm.
                sharded_state_dict_keys_map={k: v for k, v in keys.items() if not k.startswith("input_layernorm.")},
            )
        layers.append(replace(layer, submodules=submodules))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(block.layer_norm))


def gpt_layer_spec(model_config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder layers as ``GPTModelConfig.transformer_layer_spec`` builds them, from the model's configuration."""
    return mom_block_spec(model_config.transformer, vp_stage=vp_stage)
