"""Megatron's own model with the weights of a checkpoint, in a process alone."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch

from linear_moe.conversion.files import ConversionError


def gpt_model(args: Namespace, config, rows: int) -> torch.nn.Module:
    """The model that a training built, without multi-token prediction: a GPT model, or a HybridModel where the
    arguments have a pattern of layers.

    Args:
        args: the arguments stored in the checkpoint.
        config: Megatron's configuration of the layers, with the settings of the memories.
        rows: of the embedding.
    """
    sizes = {
        "vocab_size": rows,
        "max_sequence_length": args.max_position_embeddings,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_base": args.rotary_base,
    }
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern:
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        from linear_moe.layer import memory_symbol
        from linear_moe.layer.hybrid_specs import hybrid_stack_spec
        from linear_moe.pattern import GATED_DELTA_NET, MEMORY, main_layers

        memory_symbol.PATCH.apply()
        main = main_layers(pattern)
        main = main if MEMORY in main else main.replace(GATED_DELTA_NET, MEMORY)  # MoM's earlier symbol
        if "*" in main and "+" in main:
            raise ConversionError(
                f"Megatron builds --hybrid-layer-pattern {pattern} over several pipeline stages only, because a stage "
                "has softmax attention of one kind, * or +: a process alone cannot build the model"
            )
        return HybridModel(config, hybrid_stack_spec(config, None), hybrid_layer_pattern=main, **sizes)

    from megatron.core.models.gpt import GPTModel

    from linear_moe.layer.decoder_layers import mom_block_spec

    scaling = {"rope_scaling": bool(getattr(args, "use_rope_scaling", False))}
    if scaling["rope_scaling"]:
        scaling["rope_scaling_factor"] = args.rope_scaling_factor
    return GPTModel(config, mom_block_spec(config), **sizes, **scaling)


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Reads the weights of a checkpoint in the torch_dist format, whatever layout wrote the checkpoint."""
    from megatron.core import dist_checkpointing, parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder))
    model.load_state_dict(state["model"])
