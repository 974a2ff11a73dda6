"""Writes text with a Mixture-of-Memories model: an export in the Hugging Face format, or a Megatron checkpoint.

    python tools/generate.py --load runs/demo/hf --prompt "Once upon a time"
    python tools/generate.py --load runs/demo/checkpoints --prompt "A" "B" --greedy --max-new-tokens 50
    cat story.txt | python tools/generate.py --load DIR --temperature 0.8 --top-p 0.95 --seed 1

A prompt starts a document: the end-of-document token stands before the prompt, as before every document in training.
The continuation of one prompt is printed word by word. Several prompts are one batch, printed in order at the end.
Speed and the size of the model's state go to stderr.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import DTYPES, default_device, device, number, path, seed, share, whole

_temperature = number(
    float,
    lambda value: 1e-6 <= value <= 1e6,
    "a number from 1e-06 to 1e+06; --greedy always takes the most probable token",
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    model = parser.add_argument_group("model")
    model.add_argument("--load", type=path, required=True, help="folder of an export or of Megatron checkpoints")
    model.add_argument("--iteration", type=whole(0), help="Megatron checkpoint to use [the latest]")
    model.add_argument("--tokenizer", type=path, help="folder of the tokenizer [the model's]")
    model.add_argument(
        "--trust-checkpoint", action="store_true", help="run whatever code a Megatron checkpoint's files name"
    )
    model.add_argument("--dtype", choices=DTYPES, help="type to compute in [as stored]")
    model.add_argument("--device", type=device, help="device, such as cuda or cpu [cuda where there is a GPU]")
    prompt = parser.add_argument_group("prompt, from standard input without --prompt and --prompt-file")
    source = prompt.add_mutually_exclusive_group()
    source.add_argument("--prompt", nargs="+", metavar="TEXT", help="several prompts are one batch")
    source.add_argument("--prompt-file", nargs="+", type=path, metavar="FILE", help="several files are one batch")
    prompt.add_argument("--lines", action="store_true", help="every line of the files or of standard input is a prompt")
    prompt.add_argument(
        "--no-document-start",
        action="store_true",
        help="do not put the end-of-document token before a prompt, as it stands before every document in training; "
        "nothing stands before a prompt where the tokenizer has no such token",
    )
    prompt.add_argument("--skip-prompt", action="store_true", help="print only what the model adds")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--max-new-tokens", type=whole(1), default=128, help="tokens to write [%(default)s]")
    sampling.add_argument("--greedy", action="store_true", help="always take the most probable token")
    sampling.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        help="below 1: safer choices; above 1: more varied ones [%(default)s]",
    )
    sampling.add_argument(
        "--top-k", type=whole(0), default=0, help="sample from the k most probable tokens; 0: from all tokens [0]"
    )
    sampling.add_argument(
        "--top-p",
        type=share,
        default=1.0,
        help="sample from the most probable tokens that sum to this probability [1.0]",
    )
    sampling.add_argument("--seed", type=seed, help="start of the random numbers, for the same text every time")
    sampling.add_argument("--ignore-eos", action="store_true", help="continue after the end-of-document token")
    args = parser.parse_args(argv)
    if args.device is None:  # after --help, which needs no PyTorch
        args.device = device(default_device())
    return args
