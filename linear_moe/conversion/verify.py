"""Checks an export: Megatron's own model and the Hugging Face one on the same tokens, in float32 on the CPU."""

from __future__ import annotations

import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers.utils.logging import disable_progress_bar

from linear_moe.conversion.attention_arguments import LATENT_KEYS, YARN_KEYS
from linear_moe.conversion.checkpoint import MegatronCheckpoint
from linear_moe.conversion.config import DTYPES, KEYS
from linear_moe.conversion.expert_arguments import KEYS as EXPERT_KEYS
from linear_moe.conversion.files import ConversionError, load_tokenizer, read_json, tokenizer_files
from linear_moe.conversion.loading import load_model
from linear_moe.conversion.megatron_model import gpt_model, load_weights
from linear_moe.entry.machine import lone_process, prepare_machine
from linear_moe.tokens import vocabulary_size
from megatron_patches.cpu import CPU_ARGUMENTS
from megatron_patches.patch import applied, undo_all
from mom_layers.recur.rules import get_rule

BATCH = 2


@dataclass(frozen=True)
class Difference:
    """Between two models: largest of the logits', the same relative to the largest logit, and of the mean loss."""

    logits: float
    relative: float
    loss: float

    def __str__(self) -> str:
        return f"logits {self.logits:.3g} ({self.relative:.3g} of the largest), loss {self.loss:.3g}"


def verify(checkpoint_folder: Path, export_folder: Path, *, bound: float, length: int) -> Difference:
    """Runs random tokens through both models and prints the difference.

    Megatron's weights are rounded to the type of the export, so that the comparison is of the conversion alone.

    Raises ConversionError where the logits differ by more than ``bound`` of the largest one.
    """
    config = read_json(export_folder / "config.json")
    size = config["vocab_size"]
    if tokenizer_files(export_folder):
        check_vocabulary(size, load_tokenizer(export_folder))
    tokens = draw_tokens(size, length)
    expected = megatron_logits(checkpoint_folder, tokens, DTYPES[config["dtype"]])[..., :size]
    difference = compare(exported_logits(export_folder, tokens), expected, tokens)
    print(f"verified on {BATCH} x {length} tokens: {difference}")
    if not difference.relative <= bound:
        raise ConversionError(f"the export differs from the checkpoint by more than {bound:g}: {difference}")
    return difference


def check_vocabulary(size: int, tokenizer) -> None:
    """Raises ConversionError where an embedding of ``size`` rows lacks the row of a token."""
    if (needed := vocabulary_size(tokenizer)) > size:
        raise ConversionError(f"the export has {size} rows of the vocabulary, and its tokenizer needs {needed}")


def draw_tokens(size: int, length: int) -> torch.Tensor:
    """Tokens [BATCH, length] of the whole vocabulary: random ones, and the largest id."""
    tokens = torch.randint(size, (BATCH, length), generator=torch.Generator().manual_seed(0))
    tokens[-1, -1] = size - 1
    return tokens


def compare(logits: torch.Tensor, expected: torch.Tensor, tokens: torch.Tensor) -> Difference:
    """logits, expected [B, T, V]; tokens [B, T]."""
    largest = (logits - expected).abs().max().item()

    def loss(scores: torch.Tensor) -> float:
        return F.cross_entropy(scores[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten()).item()

    return Difference(largest, largest / expected.abs().max().item(), abs(loss(logits) - loss(expected)))


@torch.no_grad()
def exported_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] of an export, in float32."""
    disable_progress_bar()
    return load_model(folder, torch.float32)(tokens).logits


@torch.no_grad()
def megatron_logits(folder: Path, tokens: torch.Tensor, rounded_to: torch.dtype) -> torch.Tensor:
    """Logits [B, T, padded V] of Megatron's model with the weights of a checkpoint, rounded to a type, in float32."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with _quiet(), _megatron():
        checkpoint = MegatronCheckpoint(folder)
        exact = get_rule(checkpoint.args.mom_rule).parameter_names
        model = _model(checkpoint)
        load_weights(model, folder)
        for name, parameter in model.named_parameters():
            if not exact or not name.endswith(exact):
                parameter.copy_(parameter.to(rounded_to))
        return model(tokens, positions, None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Megatron says of packages, and of its own future, when it is imported."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _megatron() -> Iterator[None]:
    """Megatron in a world of this process alone; patches, environment and process groups are as before afterwards."""
    environment, before = dict(os.environ), applied()
    try:
        prepare_machine()
        with lone_process("gloo"):
            yield
    finally:
        undo_all(patch for patch in applied() if patch not in before)
        os.environ.clear()
        os.environ.update(environment)


def _model(checkpoint: MegatronCheckpoint):
    from linear_moe.config import MomMLATransformerConfig, MomTransformerConfig

    args = checkpoint.args
    kind = MomMLATransformerConfig if getattr(args, "multi_latent_attention", False) else MomTransformerConfig
    known = {field.name for field in fields(kind)}
    here = {name: value for name, value in CPU_ARGUMENTS.items() if name in known}
    config = kind(**_config_arguments(args, known), **here)
    return gpt_model(args, config, checkpoint.rows("embedding.word_embeddings.weight")).eval()


SOFTMAX_ARGUMENTS = (
    "num_attention_heads", "num_query_groups", "kv_channels", "linear_attention_freq", "window_size", "add_qkv_bias",
    "qk_layernorm", "rope_type", "rotary_base", *(theirs for _, theirs in (*LATENT_KEYS, *YARN_KEYS)),
)  # fmt: skip
EXPERT_ARGUMENTS = (
    "moe_layer_freq", "moe_router_pre_softmax", "moe_router_topk_scaling_factor", "moe_router_dtype",
    *(theirs for _, theirs, _ in EXPERT_KEYS),
)  # fmt: skip


def _config_arguments(args: Namespace, known: set[str]) -> dict:
    """Everything in which models that can be exported differ; the rest is Megatron's default, or was refused.

    known: names of the configuration's fields.
    """
    names = {*(name for _, name in KEYS if name != "max_position_embeddings"), *SOFTMAX_ARGUMENTS}
    experts = getattr(args, "num_experts", None)
    names |= set(EXPERT_ARGUMENTS) if experts else set()
    stored = {name: getattr(args, name) for name in names & known if getattr(args, name, None) is not None}
    if not getattr(args, "group_query_attention", True):
        stored.pop("num_query_groups", None)
    mixer = getattr(args, "token_mixer", None) or "attention"
    if mixer == "attention":
        stored.pop("linear_attention_freq", None)
    if getattr(args, "multi_latent_attention", False) and getattr(args, "q_lora_rank", None) is None:
        stored["q_lora_rank"] = None
    return stored | {
        "token_mixer": mixer,
        "num_moe_experts": experts,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": False,
        "is_hybrid_model": bool(getattr(args, "hybrid_layer_pattern", None)),
        "mom_kernels": "torch",
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "perform_initialization": False,
    }
