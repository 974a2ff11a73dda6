"""The GPT model that Megatron builds for a command line, with MoM layers where the command line asks for them."""

from __future__ import annotations


def gpt_model(args):
    """Megatron's configuration of the model that ``args`` describe. `entry.arguments.PATCH` must be applied before."""
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.arguments import core_transformer_config_from_args

    from linear_moe.config import configure
    from linear_moe.layer.decoder_layers import gpt_layer_spec

    model = gpt_config_from_args(args, config=configure(core_transformer_config_from_args, args))
    model.transformer_layer_spec = gpt_layer_spec
    return model
