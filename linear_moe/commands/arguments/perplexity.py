"""Perplexity of a text by position: how a model's loss falls along its context, far past the training length.

    python tools/perplexity.py --load runs/demo/hf --text book.txt
    python tools/perplexity.py --load DIR --text a.txt b.txt --max-length 65536 --stride 8192 --output plots/loss.png

Windows of the text are read from their first token to their last in small pieces, with the model's state carried from
piece to piece, so that memory does not grow with the length. Prints a table and draws a picture; losses are in nats a
token. A smaller --stride reads more windows, which overlap: every piece of text then stands at several positions, and
the loss of a position depends less on the text at that position.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import default_device, device, picture, whole
from linear_moe.commands.values import path as a_path

REACH = 32  # length of a window over the training length, without --max-length and where the text is long enough
WINDOWS = 4  # at least, without --max-length and where the text is long enough


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--load", type=a_path, required=True, help="folder of an export in the Hugging Face format")
    parser.add_argument("--text", type=a_path, nargs="+", required=True, help="text files; a window lies in one file")
    parser.add_argument(
        "--no-document-start",
        action="store_true",
        help="do not put the end-of-document token before a text, as it stands before every document in training",
    )
    parser.add_argument(
        "--train-length",
        type=whole(1),
        help="tokens of a training sequence [the configuration's max_position_embeddings]",
    )
    parser.add_argument(
        "--max-length",
        type=whole(1),
        help=f"tokens a window [{REACH} times the training length; less where the text has no {WINDOWS} such windows]",
    )
    parser.add_argument("--stride", type=whole(1), help="tokens from one window's start to the next [--max-length]")
    parser.add_argument(
        "--max-windows", type=whole(1), help="read at most this many windows, spread over the text [all]"
    )
    parser.add_argument("--lengths", type=_lengths, help="ends of the table's rows, as 512,2048,8192 [powers of two]")
    parser.add_argument("--chunk-size", type=whole(1), default=512, help="tokens of a forward pass [%(default)s]")
    parser.add_argument("--batch-size", type=whole(1), default=1, help="windows side by side [%(default)s]")
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="type to compute in [auto: as stored]"
    )
    parser.add_argument("--device", type=device, help="device, such as cuda or cpu [cuda where there is a GPU]")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that --load may bring along")
    parser.add_argument("--output", type=picture, default=Path("perplexity.png"), help="the picture [%(default)s]")
    args = parser.parse_args(argv)
    if args.device is None:  # after --help, which needs no PyTorch
        args.device = device(default_device())
    return args


def _lengths(text: str) -> list[int]:
    return [whole(1)(part.strip()) for part in text.split(",")]
