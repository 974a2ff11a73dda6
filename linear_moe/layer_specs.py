"""The door for Megatron's ``--spec linear_moe.layer_specs mom_layer_spec``."""

from __future__ import annotations

from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training import get_args

from linear_moe.config import MomTransformerConfig
from linear_moe.entry.environment import read_settings
from linear_moe.entry.model_patches import join_running_script
from linear_moe.layer.decoder_layers import mom_block_spec


def mom_layer_spec(model_config, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Decoder layers for a command without our launcher: Mixture-of-Memories in every layer, or in the layers that
    ``--linear-attention-freq`` says.

    The settings come from the environment and from the file that ``MOM_CONFIG`` names (`linear_moe.entry.environment`).
    """
    if not isinstance(model_config.transformer, MomTransformerConfig):
        settings, args = read_settings(), get_args()
        sharding = {name: getattr(args, name) for name in ("sft", "use_megatron_fsdp", "use_torch_fsdp2")}
        MomTransformerConfig.adopt(model_config.transformer, **settings, **sharding)
        join_running_script(settings)
    return mom_block_spec(model_config.transformer, vp_stage=vp_stage)
