"""The layers of a model as Megatron's specs: its own decoder layers, with the token mixer of some replaced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from linear_moe.config import MomTransformerConfig, has_router
from linear_moe.layer.mixer import MomTokenMixer
from linear_moe.layer.norm import TorchNorm
from linear_moe.layer.one_memory import OneMemoryTokenMixer
from linear_moe.layer.recurrent_mixer import TokenMixerSubmodules


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


@dataclass(frozen=True)
class MixerSpec:
    """The token mixer of a layer, the norm before the mixer, and the norm's names in a checkpoint.

    Attributes:
        mixer: with Transformer Engine's or local linear layers.
        norm: a module of its own; nothing where the mixer's input projection holds the norm.
        keys: prefixes of names in the layer, and what a checkpoint says instead.
    """

    mixer: ModuleSpec
    norm: ModuleSpec | type
    keys: dict[str, str] = field(default_factory=dict)


def mixer_spec(config: MomTransformerConfig) -> MixerSpec:
    """The token mixer that the configuration chooses.

    A router reads the normed tokens too, so that the norm of a MoM layer is a module. In a layer of one memory only the
    input projection reads them: Transformer Engine has a module for norm and projection together, whose names the
    checkpoint has with every backend.
    """
    backend = _backend(config)
    if has_router(config):
        linear = TokenMixerSubmodules(in_proj=backend.column_parallel_linear(), out_proj=backend.row_parallel_linear())
        return MixerSpec(ModuleSpec(module=MomTokenMixer, submodules=linear), input_norm(config))
    together = backend.column_parallel_layer_norm_linear()
    linear = TokenMixerSubmodules(
        in_proj=together or backend.column_parallel_linear(), out_proj=backend.row_parallel_linear()
    )
    return MixerSpec(
        ModuleSpec(module=OneMemoryTokenMixer, submodules=linear),
        IdentityOp if together else input_norm(config),
        {} if together else {"input_layernorm.": "self_attention.in_proj.layer_norm_"},
    )


def input_norm(config: MomTransformerConfig):
    """The norm before a layer, as a separate module."""
    rms_norm = config.normalization == "RMSNorm"
    return _norm(_backend(config).layer_norm(rms_norm=rms_norm, for_qk=False, has_residual=True))


def mom_block_spec(config: MomTransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder layers of this pipeline stage: Megatron's own layers for the configuration (Transformer Engine's or local
    modules, dense or MoE MLPs), with Mixture-of-Memories, or one memory of an update rule, as the token mixer of the
    layers in ``config.mom_layer_pattern``.
    """
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=config.transformer_impl == "transformer_engine",
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    ours = mixer_spec(config)
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
                input_layernorm=ours.norm,
                self_attention=ours.mixer,
                # In place of what Megatron calls the norm of its attention layers.
                sharded_state_dict_keys_map={k: v for k, v in keys.items() if not k.startswith("input_layernorm.")}
                | ours.keys,
            )
        layers.append(replace(layer, submodules=submodules))
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(block.layer_norm))


def gpt_layer_spec(model_config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder layers as ``GPTModelConfig.transformer_layer_spec`` builds them, from the model's configuration."""
    return mom_block_spec(model_config.transformer, vp_stage=vp_stage)
