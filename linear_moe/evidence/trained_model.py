"""A trained model of Megatron, whatever its mixer, loaded from its checkpoint into this process alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from linear_moe.conversion.checkpoint import MegatronCheckpoint, Unknown, find_checkpoint
from linear_moe.conversion.megatron_model import gpt_model, load_weights
from linear_moe.entry.machine import lone_process, prepare_machine


@contextmanager
def trained_model(checkpoints: Path) -> Iterator[torch.nn.Module]:
    """The model of the latest checkpoint in a folder, in evaluation mode and in the type of its training, on the first
    GPU or, without one, the CPU. Its layers are the layers of the training.

    Raises ConversionError where the folder has no checkpoint that can be read.
    """
    folder = find_checkpoint(checkpoints, None)
    saved = MegatronCheckpoint(folder)
    prepare_machine()
    with_gpu = torch.cuda.is_available()
    if with_gpu:
        torch.cuda.set_device(0)
    with lone_process("nccl" if with_gpu else "gloo"):
        model = _build(saved.args, saved.rows("embedding.word_embeddings.weight"))
        load_weights(model, folder)
        yield model.eval()


def _build(arguments, rows: int) -> torch.nn.Module:
    from megatron.training.arguments import core_transformer_config_from_args

    from linear_moe.config import configure

    # Objects of Megatron's own classes were not read; the configuration has a default for each.
    arguments = copy.copy(arguments)
    for name in [name for name, value in vars(arguments).items() if isinstance(value, Unknown)]:
        delattr(arguments, name)
    config = configure(core_transformer_config_from_args, arguments)
    model = gpt_model(arguments, config, rows)
    if torch.cuda.is_available():
        model.cuda()
    return model.bfloat16() if config.bf16 else model


@torch.no_grad()
def token_losses(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Loss in nats [B, L] of every token but the first of windows [B, L + 1] of token ids."""
    windows = windows.to(next(model.parameters()).device, torch.long)
    tokens, targets = windows[:, :-1], windows[:, 1:].contiguous()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return model(tokens.contiguous(), positions, None, labels=targets).float()
