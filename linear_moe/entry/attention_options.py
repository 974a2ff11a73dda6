"""Options of Megatron's attention variants in a model whose layers have memories: which have nothing to do."""

from __future__ import annotations

import argparse
import logging

from linear_moe.config import refuse_beside_mixer
from linear_moe.entry.hybrid_pattern import has_softmax_layers, whole_pattern

logger = logging.getLogger(__name__)


def check_attention(args: argparse.Namespace) -> None:
    """Raises ValueError for attention variants that softmax layers beside memories cannot have."""
    variant = getattr(args, "experimental_attention_variant", None)
    softmax = has_softmax_layers(args)
    pattern = whole_pattern(args)
    plain_hybrid = pattern is not None and args.multi_latent_attention and "*" in pattern
    mixed = args.heterogeneous_layers_config_path or args.heterogeneous_layers_config_encoded_json
    refuse_beside_mixer(args, [
        (
            mixed, "--heterogeneous-layers-config-path",
            "that file chooses each layer's attention: leave the option out, and use --linear-attention-freq",
        ),
        (
            variant == "dsa" and softmax and pattern is None,
            "--experimental-attention-variant dsa and softmax attention layers",
            "a GPT model has sparse attention in all of its softmax layers or in none: write the symbol D in "
            "--hybrid-layer-pattern, leave the option out for softmax layers of multi-latent attention, or make every "
            "layer MoM (no --linear-attention-freq, no --mtp-num-layers)",
        ),
        (
            plain_hybrid, f"--multi-latent-attention and the symbol * in --hybrid-layer-pattern {pattern}",
            "* is plain softmax attention: write + for multi-latent attention, or leave the option out",
        ),
        (
            variant not in (None, "dsa", "gated_delta_net"), f"--experimental-attention-variant {variant}",
            "leave the option out",
        ),
    ])  # fmt: skip


def drop_unused_attention(args: argparse.Namespace) -> None:
    """Switches off the attention variants that no layer of the model has, with a line in the log for each."""
    variant = getattr(args, "experimental_attention_variant", None)
    if variant is not None:
        place = (
            "MoM layers take the place of the gated delta net" if variant == "gated_delta_net" else "every layer is MoM"
        )
        logger.info("--experimental-attention-variant %s has nothing to do: %s", variant, place)
        args.experimental_attention_variant = None
    if args.multi_latent_attention and not has_softmax_layers(args):
        logger.info("--multi-latent-attention and its options have nothing to do: every layer is MoM")
        args.multi_latent_attention = args.mla_down_proj_fusion = False
        args.rope_type = None
        if "mla_up_proj" in (args.recompute_modules or []):
            args.recompute_modules = [name for name in args.recompute_modules if name != "mla_up_proj"] or None
