"""Converts a Mixture-of-Memories model in the Hugging Face format (FLA's) to a Megatron checkpoint.

    python tools/convert_from_hf.py --load DIR --save CKPT
    python -m linear_moe.pretrain --load CKPT --use-checkpoint-args <the options that the tool prints> ...

Writes a release checkpoint in the torch_dist format, without optimizer state, which loads at any tensor, pipeline and
expert-parallel layout. CKPT appears only when it is complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import path, whole


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
    parser.add_argument("--overwrite", action="store_true", help="replace --save if it is an earlier conversion")
    return parser.parse_args(argv)
