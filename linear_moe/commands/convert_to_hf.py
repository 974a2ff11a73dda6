"""Converts a Megatron checkpoint of a Mixture-of-Memories model to the Hugging Face format.

The command line is linear_moe/commands/arguments/convert_to_hf.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from linear_moe.commands import run_command
from linear_moe.commands.arguments.convert_to_hf import parse_arguments
from linear_moe.conversion.attention_arguments import FLA_ROTARY_BASE
from linear_moe.conversion.card import CardFacts, model_card
from linear_moe.conversion.checkpoint import MegatronCheckpoint, find_checkpoint
from linear_moe.conversion.config import (
    DTYPES,
    config_from_arguments,
    dtype_name,
    generation_config,
    layout_of,
    parse_config,
    token_ids,
    vocabulary,
)
from linear_moe.conversion.digests import digest, write_digests
from linear_moe.conversion.files import (
    ConversionError,
    check_target,
    copy_tokenizer,
    load_tokenizer,
    new_folder,
    tokenizer_files,
    write_json,
    write_weights,
)
from linear_moe.conversion.fla_types import content_to_fla, tensor_to_fla
from linear_moe.conversion.names import Entry, entries
from linear_moe.conversion.verify import verify
from linear_moe.conversion.weights import check_finite
from linear_moe.recall.records import commit_of
from megatron_patches.trusted_checkpoints import trusting
from mom_layers.hf.remote_code import save_remote_code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a checkpoint that cannot be converted."""
    args = parse_arguments(argv)
    if args.verify and argv is None and torch.cuda.is_available():
        # Both models run in float32 on the CPU. Megatron runs on the CPU only in a process that sees no GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.execv(sys.executable, sys.orig_argv)

    def work():
        convert(args)
        if args.model_type == "mom":  # flash-linear-attention runs the other types
            print(f"next:  linear-moe generate --load {args.save} --prompt 'def forward(self'")

    return run_command("convert_to_hf.py", work, ConversionError)


def convert(args: argparse.Namespace) -> None:
    """Writes the folder ``args.save``, all of it or nothing. Raises the errors of `export`."""
    checkpoint = find_checkpoint(args.load, args.iteration)
    check_target(args.save, ["config.json"], args.overwrite)
    with trusting(args.trust_checkpoint), new_folder(args.save) as folder:
        export(checkpoint, folder, args)
        if args.verify:
            verify(checkpoint, folder, bound=args.verify_bound, length=args.verify_tokens)


def export(checkpoint_folder: Path, folder: Path, args: argparse.Namespace) -> None:
    """Fills a folder with an export of one checkpoint.

    Raises:
        ConversionError: the checkpoint is not MoM, incomplete, or does not fit the format or the tokenizer; or a weight
            is not finite, as stored or in the type of the export.
        OSError: a file cannot be written.
    """
    checkpoint = MegatronCheckpoint(checkpoint_folder)
    tokenizer_folder = find_tokenizer(args.tokenizer, checkpoint.args)
    tokenizer = load_tokenizer(tokenizer_folder) if tokenizer_folder else None
    ids = token_ids(checkpoint.args, tokenizer)
    kinds = checkpoint.layer_kinds()
    content = config_from_arguments(checkpoint.args, kinds, 0, ids)
    rows = checkpoint.rows("embedding.word_embeddings.weight")
    content["vocab_size"] = vocabulary(checkpoint.args, rows, tokenizer)
    config = parse_config(content, set())
    layout = layout_of(config, kinds)
    if any(spec.rope_theta != FLA_ROTARY_BASE for spec in config.attention_specs()):
        print(f"FLA ignores rope_theta and computes with {FLA_ROTARY_BASE:g}: its logits will differ", file=sys.stderr)

    table = list(entries(layout))
    types = {name: _dtype(checkpoint, entry, args.dtype) for entry in table for name in entry.hf_names}
    check_complete(checkpoint, table)
    shape_of = {name: torch.empty(shape, dtype=types[name], device="meta") for e in table for name, shape in e.hf}
    heads, converted_content = content["num_heads"], content
    if args.model_type != "mom":
        converted_content = content_to_fla(content, args.model_type)
        described = dict(tensor_to_fla(name, tensor, args.model_type, heads) for name, tensor in shape_of.items())
    else:
        described = shape_of
    main_type = dtype_name(types["model.embeddings.weight"])
    converted_content["dtype"] = converted_content["torch_dtype"] = main_type
    parameters = sum(tensor.numel() for tensor in described.values())

    write_json(folder / "config.json", converted_content)
    if args.model_type == "mom":
        save_remote_code(folder)
    write_json(folder / "generation_config.json", generation_config(ids))
    if tokenizer_folder:
        copy_tokenizer(tokenizer_folder, folder, pads=True)
    root = Path(__file__).parents[2]
    commit = commit_of(root) if (root / "pyproject.toml").is_file() else None
    facts = CardFacts(args.name, args.license, args.language, args.datasets, commit)
    if args.model_type == "mom":  # the card shows how to load this project's model
        card = model_card(checkpoint.args, checkpoint.iteration, content, parameters, main_type, tokenizer, facts)
        (folder / "README.md").write_text(card, encoding="utf-8")
    total = sum(tensor.nbytes for tensor in described.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=None) as progress:
        digests: dict[str, dict[str, object]] = {}
        tensors = _converted(checkpoint, table, types, progress, digests, args.model_type, heads)
        write_weights(folder, described, tensors, args.max_shard_size)
    write_digests(folder, digests)


def find_tokenizer(given: Path | None, args: argparse.Namespace) -> Path | None:
    """The folder given, or the training's if its files still exist; otherwise None, and a warning on stderr."""
    if given is not None:
        return given
    trained = getattr(args, "tokenizer_model", None)
    if trained and tokenizer_files(Path(trained)):
        return Path(trained)
    found = (
        f"no tokenizer in {trained}" if trained else f"trained with {getattr(args, 'tokenizer_type', 'no tokenizer')}"
    )
    print(
        f"{found}: the export has no tokenizer, and perhaps a padded vocabulary; give --tokenizer to add one",
        file=sys.stderr,
    )
    return None


def check_complete(checkpoint: MegatronCheckpoint, table: Sequence[Entry]) -> None:
    """Raises ConversionError unless the table holds every tensor of the checkpoint, in its shape."""
    used = set()
    for entry in table:
        name = checkpoint.place(entry).name
        used |= {place.name for place in entry.places}
        shape, expected = checkpoint.describe(entry)[0], entry.shape
        padded = entry.row.padded and shape[0] >= expected[0] and shape[1:] == expected[1:]
        if shape != expected and not padded:
            raise ConversionError(f"{name} is {list(shape)}, and the arguments stored with it make it {list(expected)}")
    if unknown := sorted(checkpoint.names() - used):
        raise ConversionError(f"the Hugging Face format has no place for {', '.join(unknown[:3])}")


def _dtype(checkpoint: MegatronCheckpoint, entry: Entry, wanted: str | None) -> torch.dtype:
    stored = checkpoint.describe(entry)[1]
    return stored if wanted is None or entry.row.exact else DTYPES[wanted]


def _converted(
    checkpoint: MegatronCheckpoint,
    table: Sequence[Entry],
    types: dict[str, torch.dtype],
    progress: tqdm,
    digests: dict[str, dict[str, object]],
    model_type: str,
    heads: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the export. Adds its digest to ``digests``. Raises ConversionError for one that is not finite."""
    for entry in table:
        for name, stored in zip(entry.hf_names, entry.split(checkpoint.read(entry)), strict=True):
            check_finite(name, stored, f"in {checkpoint.folder}")
            tensor = stored.to(types[name]).contiguous()
            if not tensor.isfinite().all():
                raise ConversionError(
                    f"{name} overflows in {dtype_name(tensor.dtype)}, whose largest number is "
                    f"{torch.finfo(tensor.dtype).max:g}: it has {stored.abs().max():g}; give another --dtype"
                )
            if model_type != "mom":
                name, tensor = tensor_to_fla(name, tensor, model_type, heads)
            digests[name] = digest(tensor)
            yield name, tensor
            progress.update(tensor.nbytes)
