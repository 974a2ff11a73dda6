"""Megatron's own model with the weights of a checkpoint, in a process alone."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import torch


def gpt_model(args: Namespace, config, rows: int) -> torch.nn.Module:
    """The model that a training built.

    Args:
        args: the arguments stored in the checkpoint.
        config: Megatron's configuration of the layers, with the settings of the memories.
        rows: of the embedding.
    """
    from megatron.core.models.gpt import GPTModel

    from linear_moe.layer.decoder_layers import mom_block_spec

    return GPTModel(
        config,
        mom_block_spec(config),
        vocab_size=rows,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
    )


def load_weights(model: torch.nn.Module, folder: Path) -> None:
    """Reads the weights of a checkpoint in the torch_dist format, whatever layout wrote the checkpoint."""
    from megatron.core import dist_checkpointing, parallel_state

    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(folder))
    model.load_state_dict(state["model"])
