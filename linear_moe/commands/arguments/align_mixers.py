"""Makes a model with memories of a Transformer, and trains the new token mixers alone.

    python tools/align_mixers.py --load Qwen3-0.6B --data-path corpus-train --save aligned
    python tools/convert_from_hf.py --load aligned --save CKPT

This is an optional stage before training with Megatron. Every new token mixer learns to compute what the Transformer's
attention computes from the same hidden states; all other weights stay as they are. The data must be tokens of the
Transformer's own tokenizer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.arguments.convert_from_hf import add_start_arguments
from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import not_negative, path, positive, text, whole


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--load", type=path, required=True, help="folder of the Transformer, in Hugging Face's format")
    parser.add_argument("--save", type=path, required=True, help="new folder, for convert-from-hf")
    parser.add_argument(
        "--data-path", type=path, required=True, help="tokens that linear-moe preprocess wrote: the path without .bin"
    )
    parser.add_argument("--steps", type=whole(1), default=200, help="training steps [200]")
    parser.add_argument("--batch-size", type=whole(1), default=8, help="sequences of a step [8]")
    parser.add_argument("--seq-length", type=whole(2), default=1024, help="tokens of a sequence [1024]")
    parser.add_argument("--lr", type=positive, default=1e-3, help="largest learning rate [1e-3]")
    parser.add_argument("--balance", type=not_negative, default=1e-3, help="weight of the balancing loss [1e-3]")
    parser.add_argument(
        "--seed", type=whole(0), default=0, help="start of the random numbers that choose the batches [0]"
    )
    parser.add_argument("--device", type=text, help="device, such as cuda or cpu [cuda where there is a GPU]")
    parser.add_argument("--overwrite", action="store_true", help="replace --save if it is an earlier export")
    add_start_arguments(parser)
    return parser.parse_args(argv)
