"""Converts a Hugging Face folder, a Mixture-of-Memories model (FLA's too) or a Transformer, to a Megatron checkpoint.

    python tools/convert_from_hf.py --load DIR --save CKPT
    python tools/convert_from_hf.py --load Qwen3-0.6B --save CKPT --softmax-layers every-4
    python -m linear_moe.pretrain --load CKPT --use-checkpoint-args <the options that the tool prints> ...

A Transformer (Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen-MoE) becomes a model with memories: see docs/huggingface.md.
Writes a release checkpoint in the torch_dist format, without optimizer state, which loads at any tensor, pipeline and
expert-parallel layout. CKPT appears only when it is complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import path, text, whole


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--load", type=path, required=True, help="folder with config.json and the weights")
    parser.add_argument("--save", type=path, required=True, help="new folder, for Megatron's --load")
    parser.add_argument("--tokenizer", type=path, help="folder of the tokenizer [--load, if it has one]")
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=whole(1, 1 << 20),
        default=128,
        help="pad the vocabulary for Megatron, as Megatron's option of this name does [128]",
    )
    parser.add_argument(
        "--hybrid",
        action="store_true",
        help="write the layers of a HybridModel [of a GPT model, where a GPT model can have them]",
    )
    add_start_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace --save if it is an earlier conversion")
    return parser.parse_args(argv)


def add_start_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say how a Transformer becomes a model with memories."""
    group = parser.add_argument_group("start from a Transformer")
    layers = group.add_mutually_exclusive_group()
    layers.add_argument(
        "--softmax-layers",
        type=text,
        metavar="LAYERS",
        help="layers that stay softmax attention: all, none, every-N, or numbers such as 3,7,11 [every-4]",
    )
    layers.add_argument(
        "--mom-layers", type=text, metavar="LAYERS", help="layers that become MoM layers: all, every-N, or numbers"
    )
    group.add_argument(
        "--mom-num-memories",
        type=whole(0, 1 << 16),
        default=4,
        help="routed memories; 0: one memory alone, without a router [4]",
    )
    group.add_argument("--mom-topk", type=whole(0, 1 << 16), default=2, help="memories that a token goes to [2]")
    group.add_argument(
        "--mom-shared-memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one more memory, which every token goes to [yes]",
    )
    group.add_argument("--mom-conv-kernel", type=whole(2, 8), default=4, help="width of the convolutions [4]")
    group.add_argument("--mom-rule", type=text, default="gated_deltanet", help="memory update rule [gated_deltanet]")
