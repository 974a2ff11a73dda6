"""The pattern of a hybrid model's layers: which one Megatron will use, and which symbols work beside memories."""

from __future__ import annotations

import argparse
import importlib.util
import logging

import torch
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from linear_moe.config import MomTransformerConfig, has_memories, refuse_beside_mixer
from linear_moe.pattern import (
    GATED_DELTA_NET,
    MEMORY,
    PREDICTION,
    SOFTMAX,
    STAGE,
    SYMBOLS,
    main_layers,
    prediction_layers,
)

logger = logging.getLogger(__name__)


def use_present_name(args: argparse.Namespace) -> None:
    """Moves the pattern of --hybrid-override-pattern to --hybrid-layer-pattern, which Megatron's own checks would do
    later: so every check sees the pattern that the model will have.

    Raises ValueError where both are given.
    """
    old = getattr(args, "hybrid_override_pattern", None)
    if old is None:
        return
    if args.hybrid_layer_pattern is not None:
        raise ValueError(
            f"--hybrid-override-pattern {old} and --hybrid-layer-pattern {args.hybrid_layer_pattern} are two names of "
            "one argument: leave out --hybrid-override-pattern"
        )
    args.hybrid_layer_pattern, args.hybrid_override_pattern = old, None


def choose_token_mixer(args: argparse.Namespace) -> None:
    """Sets --token-mixer mom where the pattern has an R and the command line names no token mixer.

    Raises ValueError where the command line asks for softmax attention in layers that have memories.
    """
    names = ("hybrid_layer_pattern", "hybrid_override_pattern", "mtp_hybrid_override_pattern")
    patterns = [getattr(args, name, None) for name in names]
    given = next((pattern for pattern in patterns if MEMORY in (pattern or "")), None)
    if given is None:
        return
    if getattr(args, "token_mixer", None) == "attention":
        raise ValueError(
            f"--token-mixer attention and the symbol {MEMORY} in --hybrid-layer-pattern {given}: leave out "
            f"--token-mixer, or write * in place of {MEMORY}"
        )
    if getattr(args, "token_mixer", None) is None:
        args.token_mixer = "mom"


def use_memory_symbol(args: argparse.Namespace) -> None:
    """Writes R for every G of a pattern with memories that has no R, with a line in the log: before there was an R,
    --token-mixer mom built memories for G.
    """
    pattern = whole_pattern(args)
    if pattern is None or MEMORY in pattern or GATED_DELTA_NET not in pattern:
        return
    for name in ("hybrid_layer_pattern", "mtp_hybrid_override_pattern"):
        if value := getattr(args, name, None):
            setattr(args, name, value.replace(GATED_DELTA_NET, MEMORY))
    logger.info(
        "--hybrid-layer-pattern %s has no %s: its %s builds layers with memories, as --hybrid-layer-pattern %s does; "
        "in a pattern with an %s, %s is Megatron's gated delta net",
        pattern, MEMORY, GATED_DELTA_NET, whole_pattern(args), MEMORY, GATED_DELTA_NET,
    )  # fmt: skip


def whole_pattern(args: argparse.Namespace) -> str | None:
    """The pattern that Megatron will use, with that of multi-token prediction behind a "/"; None for a GPT model."""
    pattern = args.hybrid_layer_pattern
    extra = getattr(args, "mtp_hybrid_override_pattern", None)
    if extra is not None and args.mtp_num_layers and PREDICTION not in (pattern or ""):
        return (pattern or "") + args.mtp_num_layers * (PREDICTION + extra)
    return pattern


def has_softmax_layers(args: argparse.Namespace) -> bool:
    """Whether a model with memories has layers of softmax attention too, from its arguments."""
    pattern = whole_pattern(args)
    if pattern is not None:
        return any(symbol in pattern for symbol in SOFTMAX)
    freq = args.linear_attention_freq
    return bool(args.mtp_num_layers) or not (freq is None or (isinstance(freq, list) and all(freq)))


def all_mixers_are_memories(pattern: str) -> bool:
    """Whether no layer of a pattern but memories mixes tokens, and the model predicts one token."""
    return not set(pattern) - {MEMORY, "-", "E", STAGE}


def layers_of(args: argparse.Namespace) -> str:
    """The symbols of a model's layers, a mixer and an MLP for every layer of a GPT model."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None:
        layers = main_layers(pattern)
        old = has_memories(args) and MEMORY not in layers
        return layers.replace(GATED_DELTA_NET, MEMORY) if old else layers
    softmax = "+" if args.multi_latent_attention else "*"
    mixers = [MEMORY if memories else softmax for memories in MomTransformerConfig.mom_layer_pattern(args)]
    every = args.moe_layer_freq
    experts = every if isinstance(every, list) else [layer % every == 0 for layer in range(args.num_layers)]
    mlps = ["E" if args.num_experts and is_moe else "-" for is_moe in experts]
    return "".join(mixer + mlp for mixer, mlp in zip(mixers, mlps, strict=True))


def with_a_memory_layer(pattern: str) -> str:
    """A pattern to write in place of one without R: R for every Mamba layer, else for the first attention layer."""
    for symbol, count in (("M", -1), ("*", 1), ("+", 1), ("D", 1)):
        if symbol in pattern:
            return pattern.replace(symbol, MEMORY, count)
    return MEMORY + pattern


def _name_symbols() -> str:
    """The symbols of the running Megatron, each with its layer."""
    known = Symbols.VALID_LAYERS | {MEMORY}
    named = ", ".join(f"{symbol} ({layer})" for symbol, layer in SYMBOLS.items() if symbol in known)
    return f"{named}, {STAGE} between pipeline stages, {PREDICTION} before multi-token prediction"


def check_pattern(args: argparse.Namespace) -> None:
    """Raises ValueError for a pattern with unknown symbols or without memories, and for symbols whose layers do not
    work beside memories, or not on this machine.
    """
    pattern = whole_pattern(args)
    if pattern is None:
        return
    given = f"--hybrid-layer-pattern {pattern}"
    known = (Symbols.VALID_LAYERS | {MEMORY}) & SYMBOLS.keys()
    for symbol in pattern:
        if symbol not in known | {STAGE, PREDICTION}:
            raise ValueError(f"{given}: {symbol!r} is not the symbol of a layer: use {_name_symbols()}")
    main = main_layers(pattern)
    if MEMORY not in main:
        first, rest = pattern.split(PREDICTION)[0], pattern.partition(PREDICTION)[1:]
        raise ValueError(
            f"{given} has no layer with memories: write {MEMORY} for each layer that is to have memories, for example "
            f"--hybrid-layer-pattern '{with_a_memory_layer(first)}{''.join(rest)}', or leave out --token-mixer "
            f"{args.token_mixer}"
        )
    freq = args.linear_attention_freq
    local = args.transformer_impl == "local" and not args.spec
    with_engine = "use --transformer-impl transformer_engine"
    refuse_beside_mixer(args, [
        (
            freq is not None, f"--linear-attention-freq {freq} and {given}",
            "the pattern names every layer's mixer: leave out --linear-attention-freq",
        ),
        (
            local and "M" in pattern, f"the symbol M in {given} and --transformer-impl local",
            f"Megatron's Mamba layers need Transformer Engine: write {MEMORY} in place of M, or {with_engine}",
        ),
        (
            local and "D" in pattern, f"the symbol D in {given} and --transformer-impl local",
            f"Megatron's sparse attention needs Transformer Engine: write + in place of D, or {with_engine}",
        ),
        (
            # A HybridModel gives the last stage an output layer of its own and ties its checkpoint to the embedding.
            prediction_layers(pattern)[1] and args.pipeline_model_parallel_size > 1
            and not args.untie_embeddings_and_output_weights,
            f"multi-token prediction in {given}, --pipeline-model-parallel-size {args.pipeline_model_parallel_size} "
            "and tied embeddings",
            "Megatron's HybridModel cannot save them (core/models/common/language_module/language_module.py:497): add "
            "--untie-embeddings-and-output-weights",
        ),
        (
            GATED_DELTA_NET in pattern and torch.cuda.is_available() and importlib.util.find_spec("fla") is None,
            f"the symbol {GATED_DELTA_NET} in {given} without flash-linear-attention",
            f"it has the kernels of Megatron's gated delta net: pip install flash-linear-attention, or write {MEMORY}",
        ),
    ])  # fmt: skip
