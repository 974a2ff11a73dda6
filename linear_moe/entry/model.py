"""The model that Megatron builds for a command line, with MoM layers where the command line asks for them."""

from __future__ import annotations

from linear_moe.config import OUR_SPEC


def model_config(args):
    """Megatron's configuration of the model that ``args`` describe: a HybridModel where there is a pattern of layers,
    else a GPTModel. `entry.arguments.PATCH` must be applied before.
    """
    from megatron.training.arguments import core_transformer_config_from_args

    from linear_moe.config import configure

    config = configure(core_transformer_config_from_args, args)
    return _gpt_model(args, config) if args.hybrid_layer_pattern is None else _hybrid_model(args, config)


def _gpt_model(args, config):
    from megatron.training.argument_utils import gpt_config_from_args

    from linear_moe.layer.decoder_layers import gpt_layer_spec

    model = gpt_config_from_args(args, config=config)
    model.transformer_layer_spec = gpt_layer_spec
    return model


def _hybrid_model(args, config):
    from megatron.training.argument_utils import hybrid_config_from_args

    from linear_moe.layer import memory_symbol
    from linear_moe.layer.hybrid_specs import hybrid_stack_spec

    memory_symbol.PATCH.apply()
    if args.spec is not None and " ".join(args.spec) == OUR_SPEC:  # layers of a GPTModel
        args.spec = None
    model = hybrid_config_from_args(args, config=config)
    model.hybrid_stack_spec = hybrid_stack_spec(config, model.hybrid_stack_spec)
    return model
