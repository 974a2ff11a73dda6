"""The patches that put Mixture-of-Memories into an unmodified Megatron-LM script, and when each is applied."""

from __future__ import annotations

from collections.abc import Iterable

import torch

import megatron_patches
from linear_moe.config import configure, has_memories, has_router
from linear_moe.entry import arguments, kernel_check, log, machine
from megatron_patches import releases
from megatron_patches.patch import Patch, applied, apply_all, undo_all, wrap

# linear_moe.layer and linear_moe.watching are imported inside functions: a run without memories, which gets only our
# arguments, imports neither the layers nor megatron.training.training.


def _configure(core_transformer_config_from_args, args, config_class=None):
    from megatron.core.transformer.transformer_config import TransformerConfig

    if has_memories(args) and config_class in (None, TransformerConfig):
        return configure(core_transformer_config_from_args, args)
    return core_transformer_config_from_args(args, config_class)


def _layers(config, vp_stage):
    """The decoder layers of a model with memories; None for a model without."""
    from linear_moe.layer.decoder_layers import mom_block_spec

    return mom_block_spec(config, vp_stage=vp_stage) if has_memories(config) else None


def _stack(config, chosen):
    """The layers of a hybrid model whose builder has chosen Megatron's own layers, or the layers that --spec names."""
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as megatrons_own

    from linear_moe.layer.hybrid_specs import hybrid_stack_spec

    if not has_memories(config):
        return chosen
    return hybrid_stack_spec(config, None if chosen is megatrons_own else chosen)


def _routed_memories(config) -> int | None:
    return config.mom_num_memories if has_router(config) else None


def _choose_layers(default_layer_spec, model_config, vp_stage):
    layers = _layers(model_config.transformer, vp_stage)
    return default_layer_spec(model_config, vp_stage) if layers is None else layers


def _choose_hybrid_layers(hybrid_config_from_args, args, *positional, **keywords):
    from linear_moe.layer.hybrid_specs import hybrid_stack_spec

    model_config = hybrid_config_from_args(args, *positional, **keywords)
    if has_memories(args):
        model_config.hybrid_stack_spec = hybrid_stack_spec(model_config.transformer, model_config.hybrid_stack_spec)
    return model_config


def require_memories(model: Iterable[torch.nn.Module]) -> None:
    """Raises RuntimeError where no layer of a model has memories, in all processes of the job together.

    model: the parts of the model that this process holds; a pipeline stage may have no layer with memories.
    """
    from linear_moe.layer.recurrent_mixer import RecurrentTokenMixer

    here = any(isinstance(module, RecurrentTokenMixer) for part in model for module in part.modules())
    found = torch.tensor([float(here)], device=torch.cuda.current_device() if torch.cuda.is_available() else "cpu")
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(found)
    if not found.item():
        raise RuntimeError(
            "--token-mixer: no layer of the model that this script built has memories; run a script that builds "
            "its model as pretrain_gpt.py and pretrain_hybrid.py do"
        )


def _set_up_model(setup_model_and_optimizer, *positional, **keywords):
    from megatron.training import get_args

    model, *rest = setup_model_and_optimizer(*positional, **keywords)
    if has_memories(get_args()):
        require_memories(model)
    return model, *rest


def model_patch() -> Patch:
    """Gives the model its configuration's class and its layers, and checks that there are memories among the layers."""
    hooks = releases.ModelHooks(configure=_configure, layers=_layers, stack=_stack, routed_memories=_routed_memories)
    return Patch(
        name="model",
        reason="the class of the configuration and the layers of a GPT or hybrid model are chosen from fixed lists",
        removed_when="megatron.training has a registry of token mixers, each with its configuration and layer spec",
        targets=(
            wrap("megatron.training.argument_utils", "core_transformer_config_from_args", _configure),
            wrap("megatron.training.argument_utils", "hybrid_config_from_args", _choose_hybrid_layers),
            wrap("megatron.training.models.gpt", "default_layer_spec", _choose_layers),
            wrap("megatron.training.training", "setup_model_and_optimizer", _set_up_model),
            *releases.running().model_targets(hooks),
        ),
    )


def training_patches() -> tuple[Patch, ...]:
    """Patches of a run of another script with MoM layers, once Megatron has built the configuration."""
    from linear_moe.watching.reporter import AddedLineReporter

    return (*machine.training_patches(), AddedLineReporter().patch())


def launcher_patches() -> tuple[Patch, ...]:
    """Patches of a run that the launcher starts with --token-mixer mom, beside those of the machine."""
    from linear_moe.layer import checkpoint_names, memory_symbol

    return (arguments.PATCH, memory_symbol.PATCH, checkpoint_names.PATCH, model_patch(), *training_patches())


def patches() -> tuple[Patch, ...]:
    """Every patch that a run of this project can have, each once: through the launcher, through ``--spec``, through
    `linear_moe.pretrain`, from Megatron's wheel, and on a machine without a GPU.
    """
    from linear_moe.watching.reporter import WholeLineReporter

    every = (*megatron_patches.patches(), *launcher_patches(), WholeLineReporter().patch())
    return tuple({patch.name: patch for patch in every}.values())


def install(*, mom: bool) -> None:
    """Applies the patches of the launcher; without ``mom`` only the patch that adds our arguments. Call it before the
    script runs.
    """
    apply_all(launcher_patches() if mom else [arguments.PATCH])


def uninstall() -> None:
    """Undoes every patch of `patches` that is in effect: Megatron is as it was before this project changed it."""
    ours = {patch.name for patch in patches()}
    undo_all(patch for patch in applied() if patch.name in ours)


def join_running_script(settings: dict[str, object]) -> None:
    """For ``--spec``, what `install` does for the launcher, in a run that has parsed its arguments already.

    The settings become arguments of the run, so that its checkpoints carry them.
    """
    from megatron.training import get_args

    args = get_args()
    for name, value in settings.items():
        setattr(args, name, value)
    arguments.fill_mom_arguments(args)
    arguments.check_context_parallel(args)
    log.show_log()
    apply_all(training_patches())  # one of them limits what the check of --load may unpickle
    arguments.check_run(args)
    log.announce()
    arguments.place_memories(args)
    kernel_check.check_kernels(args)
