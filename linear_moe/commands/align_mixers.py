"""Makes a model with memories of a Transformer, and trains the new token mixers alone against its hidden states.

The command line is linear_moe/commands/arguments/align_mixers.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from linear_moe.commands import run_command
from linear_moe.commands.arguments.align_mixers import parse_arguments
from linear_moe.commands.convert_from_hf import start_of
from linear_moe.conversion.alignment import Alignment, Windows, train
from linear_moe.conversion.files import ConversionError, check_target, copy_tokenizer, new_folder, tokenizer_files


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a Transformer or data that cannot be used."""
    args = parse_arguments(argv)
    return run_command("align_mixers.py", lambda: align(args), ConversionError)


def align(args: argparse.Namespace) -> None:
    """Writes the folder ``args.save``, all of it or nothing, and prints the next command."""
    if not args.load.is_dir():
        raise ConversionError(f"--load {args.load}: no such folder")
    check_target(args.save, ["config.json"], args.overwrite)
    torch.manual_seed(args.seed)
    alignment = Alignment(
        args.load, start_of(args), torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    )
    for note in alignment.model.notes:
        print(note)
    windows = Windows(
        args.data_path, args.batch_size, args.seq_length, alignment.model.config.vocab_size, seed=args.seed
    )

    def say(step: int, errors: dict[int, float]) -> None:
        print(
            f"step {step + 1:5} of {args.steps}: error {sum(errors.values()) / len(errors):.4f} of the attention's "
            f"output, largest {max(errors.values()):.4f}",
            flush=True,
        )

    train(alignment, windows, steps=args.steps, rate=args.lr, balance=args.balance, say=say)
    with new_folder(args.save) as folder:
        alignment.save(folder)
        if tokenizer_files(args.load):
            copy_tokenizer(args.load, folder, pads=True)
    print(f"next:  {sys.executable} -m linear_moe.cli convert-from-hf --load {args.save} --save {args.save}-megatron")
