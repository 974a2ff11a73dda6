"""The patches that put Mixture-of-Memories into an unmodified Megatron-LM script, and when each is applied."""

from __future__ import annotations

from linear_moe.entry import arguments, checks, core_v018, machine
from megatron_patches import checkpoints, float32_parameters, reshardable_optimizer
from megatron_patches.patch import Patch, apply_all, undo_all, wrap


def _configure(core_transformer_config_from_args, args, config_class=None):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from linear_moe.config import MomTransformerConfig

    if getattr(args, "token_mixer", "attention") == "mom" and config_class in (None, TransformerConfig):
        config_class = MomTransformerConfig
    return core_transformer_config_from_args(args, config_class)


def _choose_layers(default_layer_spec, model_config, vp_stage):
    from linear_moe.layer.specs import gpt_layer_spec

    if getattr(model_config.transformer, "token_mixer", "attention") != "mom":
        return default_layer_spec(model_config, vp_stage)
    return gpt_layer_spec(model_config, vp_stage)


def _choose_hybrid_layers(hybrid_config_from_args, args, *positional, **keywords):
    from linear_moe.layer.hybrid_specs import hybrid_stack_spec

    model_config = hybrid_config_from_args(args, *positional, **keywords)
    if args.token_mixer == "mom":
        model_config.hybrid_stack_spec = hybrid_stack_spec(model_config.transformer, model_config.hybrid_stack_spec)
    return model_config


def model_patch() -> Patch:
    """Gives the model its configuration's class and its layers."""
    default_layers = wrap("megatron.training.models.gpt", "default_layer_spec", _choose_layers)
    return Patch(
        name="model",
        reason="the class of the configuration and the layers of a GPT or hybrid model are chosen from fixed lists",
        removed_when="megatron.training has a registry of token mixers, each with its configuration and layer spec",
        targets=(
            wrap("megatron.training.argument_utils", "core_transformer_config_from_args", _configure),
            wrap("megatron.training.argument_utils", "hybrid_config_from_args", _choose_hybrid_layers),
            *(core_v018.targets(_configure) if core_v018.is_running() else [default_layers]),
        ),
    )


def training_patches() -> tuple[Patch, ...]:
    """Patches that a run with MoM layers needs once its model is known."""
    from linear_moe.watching import training_log

    return (
        float32_parameters.PATCH,
        reshardable_optimizer.PATCH,
        *checkpoints.patches(),
        checks.PATCH,
        training_log.PATCH,
    )


def patches() -> tuple[Patch, ...]:
    """Every patch of a run that the launcher starts with --token-mixer mom on a machine with GPUs."""
    return (arguments.PATCH, model_patch(), *training_patches())


def install(*, mom: bool) -> None:
    """To be called before the script is run. Without ``mom`` nothing but the arguments is added."""
    apply_all(patches() if mom else [arguments.PATCH])


def uninstall() -> None:
    """Takes everything back that `install` did: Megatron is as it was."""
    undo_all(patches())


def join_running_script(settings: dict[str, object]) -> None:
    """What `install` does for the launcher, for ``--spec``: in a run that has parsed its arguments already.

    The settings become arguments of the run, so that its checkpoints carry them.
    """
    from megatron.training import get_args

    args = get_args()
    for name, value in settings.items():
        setattr(args, name, value)
    arguments.fill_mom_arguments(args)
    arguments.check_context_parallel(args)
    arguments.check_run(args)
    machine.show_log()
    apply_all(training_patches())
    machine.announce()
