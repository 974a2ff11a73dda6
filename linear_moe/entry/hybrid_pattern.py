"""The pattern of a hybrid model's layers: which one Megatron will use, and which letters work beside memories."""

from __future__ import annotations

import argparse

from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols

from linear_moe.config import refuse_beside_mixer

SOFTMAX = "*+"
"""Letters of softmax attention, of both kinds: plain and multi-latent."""


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


def whole_pattern(args: argparse.Namespace) -> str | None:
    """The pattern that Megatron will use, with that of multi-token prediction behind a "/"; None for a GPT model."""
    pattern, separator = args.hybrid_layer_pattern, Symbols.MTP_SEPARATOR
    extra = getattr(args, "mtp_hybrid_override_pattern", None)
    if extra is not None and args.mtp_num_layers and separator not in (pattern or ""):
        return (pattern or "") + args.mtp_num_layers * (separator + extra)
    return pattern


def has_softmax_layers(args: argparse.Namespace) -> bool:
    """Whether a model with memories has layers of softmax attention too, from its arguments."""
    pattern = whole_pattern(args)
    if pattern is not None:
        return any(letter in pattern for letter in SOFTMAX)
    freq = args.linear_attention_freq
    return bool(args.mtp_num_layers) or not (freq is None or (isinstance(freq, list) and all(freq)))


def with_a_memory_layer(pattern: str) -> str:
    """A pattern to write in place of one without G: G for every Mamba layer, else for the first attention layer."""
    for letter, count in ((Symbols.MAMBA, -1), ("*", 1), ("+", 1), ("D", 1)):
        if letter in pattern:
            return pattern.replace(letter, Symbols.GDN, count)
    return Symbols.GDN + pattern


def check_pattern(args: argparse.Namespace) -> None:
    """Raises ValueError for a pattern without memories, and for letters whose layers do not work beside memories."""
    pattern = whole_pattern(args)
    if pattern is None:
        return
    main, *_ = pattern.split(Symbols.MTP_SEPARATOR)
    local = args.transformer_impl == "local" and not args.spec
    given = f"--hybrid-layer-pattern {pattern}"
    if Symbols.GDN not in main:
        better = pattern.replace(main, with_a_memory_layer(main), 1) if main else Symbols.GDN + pattern
        raise ValueError(
            f"{given} has no layer with memories: write G for each layer that is to have memories, for example "
            f"--hybrid-layer-pattern '{better}', or leave out --token-mixer {args.token_mixer}"
        )
    refuse_beside_mixer(args, [
        (
            Symbols.DS_ATTENTION in pattern, f"the letter D in {given}",
            "Megatron scales one extra loss, the memories' or sparse attention's: write + for multi-latent attention",
        ),
        (
            local and Symbols.MAMBA in pattern, f"the letter M in {given} and --transformer-impl local",
            "Megatron's Mamba layers need Transformer Engine: write G in place of M, or use --transformer-impl "
            "transformer_engine",
        ),
    ])  # fmt: skip
