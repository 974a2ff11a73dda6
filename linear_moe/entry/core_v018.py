"""What core_v0.18 does elsewhere than later releases: it builds GPT models in a file beside its scripts, and tells the
routers' losses the main loss's scale in models with experts only. To be deleted with its support.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec

from megatron_patches.patch import Target, wrap


def is_running() -> bool:
    """Whether the Megatron that this process imports has the scripts' builders, and not yet its own."""
    return find_spec("megatron.training.models.gpt") is None and find_spec("gpt_builders") is not None


def _choose_layers(gpt_model, config, transformer_layer_spec, *positional, vp_stage=None, **keywords):
    from linear_moe.layer.specs import mom_block_spec

    if getattr(config, "token_mixer", "attention") == "mom":
        transformer_layer_spec = mom_block_spec(config, vp_stage=vp_stage)
    return gpt_model(config, transformer_layer_spec, *positional, vp_stage=vp_stage, **keywords)


def _scale_router_losses(calculate_loss, model, output_tensor, loss_func, config, *positional, **keywords):
    if getattr(config, "token_mixer", "attention") == "mom" and config.num_moe_experts is None:
        config = copy.copy(config)
        config.num_moe_experts = config.mom_num_memories
    return calculate_loss(model, output_tensor, loss_func, config, *positional, **keywords)


def targets(configure: Callable) -> tuple[Target, ...]:
    """In the place of `megatron.training.models.gpt.default_layer_spec`.

    Args:
        configure: what the model patch puts around `core_transformer_config_from_args`, which the builders have
            imported by name before that is in place.
    """
    return (
        wrap("gpt_builders", "core_transformer_config_from_args", configure),
        wrap("gpt_builders", "GPTModel", _choose_layers),
        wrap("megatron.core.pipeline_parallel.schedules", "forward_step_calc_loss", _scale_router_losses),
    )
