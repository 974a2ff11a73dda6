"""core_v0.18: builds GPT models in gpt_builders.py, a file beside Megatron-LM's scripts, and passes the scale of the
main loss to the router losses of models with experts only.
"""

import copy
from argparse import Namespace

from megatron_patches.releases.release import ModelHooks, Release
from megatron_patches.target import Target, wrap


def _refusals(args: Namespace) -> tuple[tuple[object, str, str], ...]:
    pattern = args.hybrid_layer_pattern
    return (
        (
            pattern,
            f"--hybrid-layer-pattern {pattern} in core_v0.18",
            "use pretrain_gpt.py with --linear-attention-freq, or core_v0.19",
        ),
        (
            args.moe_router_enable_expert_bias,
            "--moe-router-enable-expert-bias in core_v0.18",
            "that release counts the memories among the experts: leave the option out, or use core_v0.19",
        ),
    )


def _model_targets(hooks: ModelHooks) -> tuple[Target, ...]:
    def choose_layers(gpt_model, config, transformer_layer_spec, *positional, vp_stage=None, **keywords):
        layers = hooks.layers(config, vp_stage)
        spec = transformer_layer_spec if layers is None else layers
        return gpt_model(config, spec, *positional, vp_stage=vp_stage, **keywords)

    def scale_router_losses(calculate_loss, model, output_tensor, loss_func, config, *positional, **keywords):
        memories = hooks.routed_memories(config)
        if memories is not None and config.num_moe_experts is None:
            config = copy.copy(config)
            config.num_moe_experts = memories
        return calculate_loss(model, output_tensor, loss_func, config, *positional, **keywords)

    return (
        # gpt_builders imports the function by name, before the patch of megatron.training.argument_utils is applied.
        wrap("gpt_builders", "core_transformer_config_from_args", hooks.configure),
        wrap("gpt_builders", "GPTModel", choose_layers),
        wrap("megatron.core.pipeline_parallel.schedules", "forward_step_calc_loss", scale_router_losses),
    )


RELEASE = Release(
    series="0.18",
    moved={("megatron.training.models.gpt", "default_layer_spec"): None},
    lacks={"dataloader_inter_document_masking": False},
    refusals=_refusals,
    model_targets=_model_targets,
)
