"""Converts a Hugging Face folder, a Mixture-of-Memories model (FLA's too) or a Transformer, to a Megatron checkpoint.

The command line is linear_moe/commands/arguments/convert_from_hf.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from linear_moe.commands import run_command
from linear_moe.commands.arguments.convert_from_hf import parse_arguments
from linear_moe.conversion.attention_arguments import attention_options
from linear_moe.conversion.beginnings import Start, begin
from linear_moe.conversion.checkpoint import TRACKER, write_checkpoint
from linear_moe.conversion.config import arguments_from_config
from linear_moe.conversion.expert_arguments import expert_options
from linear_moe.conversion.files import (
    ConversionError,
    check_target,
    copy_tokenizer,
    load_tokenizer,
    new_folder,
    tokenizer_files,
)
from linear_moe.conversion.memories_from_softmax import Memories
from linear_moe.conversion.names import Entry
from linear_moe.tokens import vocabulary_size
from mom_layers.hf.configuration_mom import MomConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a model that cannot be converted."""
    args = parse_arguments(argv)
    return run_command("convert_from_hf.py", lambda: convert(args), ConversionError)


def convert(args: argparse.Namespace) -> None:
    """Writes the folder ``args.save``, all of it or nothing, and prints how to train from it.

    Raises:
        ConversionError: the model is not MoM, incomplete, or has a feature that Megatron's model lacks.
        OSError: a file cannot be written.
    """
    if not args.load.is_dir():
        raise ConversionError(f"--load {args.load}: no such folder")
    check_target(args.save, [TRACKER], args.overwrite)
    model = begin(args.load, start_of(args), hybrid=args.hybrid)
    config, tensors = model.config, model.tensors
    stored = arguments_from_config(config, model.kinds)
    tokenizer = find_tokenizer(args, config)
    set_vocabulary(stored, config, tokenizer, args)
    options = command_line(args.save, stored)

    def read(entry: Entry) -> torch.Tensor:
        tensor = entry.join([tensors.read(name) for name in entry.hf_names])
        progress.update(tensor.nbytes)
        return tensor

    total = sum(tensors.describe(name).nbytes for entry in model.table for name in entry.hf_names)
    with (
        new_folder(args.save) as folder,
        tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as progress,
    ):
        write_checkpoint(folder, model.layout, lambda entry: tensors.describe(entry.hf_names[0]).dtype, read, stored)
        if tokenizer:
            copy_tokenizer(tokenizer, folder / "tokenizer", pads=False)
    for note in model.notes:
        print(note)
    print(f"train further with:\n  {training_command(args.save, options)}")


def start_of(args: argparse.Namespace) -> Start:
    """How a Transformer becomes a model with memories, from the command line."""
    memories = Memories(**{name: getattr(args, f"mom_{name}") for name in vars(Memories())})
    return Start(args.softmax_layers, args.mom_layers, memories)


def find_tokenizer(args: argparse.Namespace, config: MomConfig) -> Path | None:
    """The folder given, or the model's own tokenizer, or None. Raises ConversionError for too large a vocabulary."""
    folder = args.tokenizer or (args.load if tokenizer_files(args.load) else None)
    if folder is None:
        return None
    size = vocabulary_size(load_tokenizer(folder))
    if size > config.vocab_size:
        raise ConversionError(
            f"the tokenizer in {folder} needs {size} rows, one more than its largest id, and the model's embedding has "
            f"{config.vocab_size}: give the model's --tokenizer"
        )
    return folder


def set_vocabulary(stored: Namespace, config: MomConfig, tokenizer: Path | None, args: argparse.Namespace) -> None:
    """Stores which tokenizer Megatron uses and how many rows its embedding has."""
    multiple = args.make_vocab_size_divisible_by
    stored.make_vocab_size_divisible_by = multiple
    stored.padded_vocab_size = -(-config.vocab_size // multiple) * multiple
    stored.tokenizer_type = "HuggingFaceTokenizer" if tokenizer else "NullTokenizer"
    stored.tokenizer_model = os.path.realpath(args.save / "tokenizer") if tokenizer else None


def training_command(save: Path, options: str) -> str:
    """A whole command that trains the converted model, with values to change."""
    further = shlex.quote(f"{save}-further")
    return " \\\n    ".join([
        f"{shlex.quote(sys.executable)} -m linear_moe.pretrain {options}",
        f"--save {further} --save-interval 500 --dist-ckpt-optim-fully-reshardable",
        "--data-path PREFIX --split 99,1,0 --no-create-attention-mask-in-dataloader",
        "--micro-batch-size 4 --global-batch-size 32 --train-iters 1000 --lr 1e-4 --min-lr 1e-5 --eval-interval 500",
    ])  # fmt: skip


def command_line(save: Path, stored: Namespace) -> str:
    """The options that ``--use-checkpoint-args`` does not restore."""
    words = [f"--load {shlex.quote(str(save))} --use-checkpoint-args --norm-epsilon {stored.layernorm_epsilon:g}"]
    words += attention_options(stored) + expert_options(stored)
    if stored.tokenizer_model is None:
        words.append(f"--vocab-size {stored.vocab_size}")
    return " ".join(words)
