"""core_v0.18: builds models in gpt_builders.py and hybrid_builders.py, files beside Megatron-LM's scripts, and passes
the scale of the main loss to the router losses of models with experts only.
"""

import copy
import importlib.util
from argparse import Namespace

from megatron_patches.releases.release import ModelHooks, Release
from megatron_patches.target import Target, wrap


def _refusals(args: Namespace) -> tuple[tuple[object, str, str], ...]:
    return (
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

    def build_hybrid_model(hybrid_builder, args, *positional, **keywords):
        if args.spec is None:  # which hybrid_builder refuses
            args = copy.copy(args)
            args.spec = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]
        return hybrid_builder(args, *positional, **keywords)

    def choose_stack(hybrid_model, config, hybrid_stack_spec, *positional, **keywords):
        return hybrid_model(config, hooks.stack(config, hybrid_stack_spec), *positional, **keywords)

    hybrid = (
        wrap("hybrid_builders", "core_transformer_config_from_args", hooks.configure),
        wrap("hybrid_builders", "hybrid_builder", build_hybrid_model),
        wrap("hybrid_builders", "HybridModel", choose_stack),
    )
    return (
        *(hybrid if importlib.util.find_spec("hybrid_builders") else ()),
        # gpt_builders imports the function by name, before the patch of megatron.training.argument_utils is applied.
        wrap("gpt_builders", "core_transformer_config_from_args", hooks.configure),
        wrap("gpt_builders", "GPTModel", choose_layers),
        wrap("megatron.core.pipeline_parallel.schedules", "forward_step_calc_loss", scale_router_losses),
    )


_GATED_DELTA_NET = "megatron.core.ssm.gated_delta_net"
RELEASE = Release(
    series="0.18",
    moved={
        ("megatron.training.models.gpt", "default_layer_spec"): None,
        ("megatron.training.checkpointing", "_maybe_setup_gpt_to_hybrid_load"): None,
        **{(f"{_GATED_DELTA_NET}.common", name): (_GATED_DELTA_NET, name) for name in ("HAVE_FLA", "l2norm")},
        (f"{_GATED_DELTA_NET}.common", "_GDNBase.__init__"): (_GATED_DELTA_NET, "GatedDeltaNet.__init__"),
    },
    lacks={"dataloader_inter_document_masking": False},
    refusals=_refusals,
    model_targets=_model_targets,
)
