"""Turns text into the `.bin` and `.idx` files that Megatron trains on.

    python tools/preprocess_data.py --input corpus.jsonl --output data/corpus --train-tokenizer 4096
    python tools/preprocess_data.py --input texts/ --suffixes .md .py --output data/texts --tokenizer tokenizer/
    python tools/preprocess_data.py --input OWNER/DATASET shard.parquet --output data/mine --tokenizer OWNER/MODEL

Reads text files and files of JSON lines, plain or compressed, and folders of such files. Writes OUTPUT.bin and
OUTPUT.idx, or OUTPUT-train.* and OUTPUT-valid.* with --validation-fraction, and OUTPUT.json with the facts about them.
The output does not depend on the number of workers. No file appears under its name before all files are complete.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import fraction, text, whole
from linear_moe.commands.values import path as a_path
from linear_moe.corpus.files import DEFAULT_SUFFIXES
from linear_moe.corpus.hub import is_hub_name
from linear_moe.corpus.vocabulary import LARGEST_VOCABULARY, SMALLEST_VOCABULARY

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

MOST_WORKERS = 1024


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--input",
        nargs="+",
        type=a_path,
        required=True,
        metavar="PATH",
        help="files or folders of text; parquet files; folders that the library datasets saved; owner/name of a data "
        "set on the hub",
    )
    data.add_argument("--split", type=text, help="split of a data set to read [train]")
    data.add_argument("--output", required=True, metavar="PREFIX", help="path of the output files, without extension")
    data.add_argument(
        "--suffixes",
        nargs="+",
        default=list(DEFAULT_SUFFIXES),
        metavar="SUFFIX",
        help="which files of a folder to read; their compressed forms (.gz, .zst) are read too [.txt .md .jsonl]",
    )
    data.add_argument(
        "--json-key", default="text", help="key of the text in a JSON line, or column of the text in a table [text]"
    )
    data.add_argument(
        "--max-bad-lines",
        type=whole(0),
        default=1000,
        help="stop when more lines or files than this are unusable [%(default)s]",
    )
    data.add_argument(
        "--validation-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="share of the documents to set apart for validation, chosen by a hash of their text [0: none]",
    )
    data.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    tokens = parser.add_argument_group("tokens")
    source = tokens.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tokenizer", type=a_path, metavar="DIR", help="folder of a Hugging Face tokenizer, or owner/name on the hub"
    )
    source.add_argument(
        "--train-tokenizer",
        type=whole(SMALLEST_VOCABULARY, LARGEST_VOCABULARY),
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE tokenizer on the input",
    )
    tokens.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that the folder of --tokenizer may bring along"
    )
    tokens.add_argument(
        "--tokenizer-output", type=a_path, metavar="DIR", help="folder for a trained tokenizer [PREFIX-tokenizer]"
    )
    tokens.add_argument(
        "--tokenizer-bytes", type=whole(1), default=1 << 25, help="bytes of text that train a tokenizer [%(default)s]"
    )
    tokens.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's end-of-document token [yes]",
    )
    parser.add_argument(
        "--workers",
        type=whole(1, MOST_WORKERS),
        default=os.cpu_count(),
        help="tokenizing processes; 1 tokenizes in the main process [as many as processor cores: %(default)s]",
    )
    args = parser.parse_args(argv)
    try:
        _check(args, parser.error)
    except OSError as error:  # a name that no file can have
        parser.error(f"{error.filename}: {error.strerror}")
    return args


def _check(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    for path in args.input:
        if is_hub_name(path):
            continue
        if not path.exists():
            refuse(f"--input {path}: no such file or folder")
        if not path.is_dir() and not path.is_file():  # a pipe, whose other end may never come, or a device without end
            refuse(f"--input {path}: expected a regular file or a folder")
    for suffix in args.suffixes:
        if not suffix.startswith("."):
            refuse(f"--suffixes {suffix}: expected a leading dot, as in .txt")
    if args.output.endswith("/") or Path(args.output).name in ("", ".", ".."):
        refuse(f"--output {args.output}: expected a path without extension, such as data/corpus, not a folder")
    if args.tokenizer and not args.tokenizer.is_dir() and not is_hub_name(args.tokenizer):
        refuse(
            f"--tokenizer {args.tokenizer}: no such folder; expected one that save_pretrained wrote, or owner/name on "
            "the Hugging Face hub"
        )
    if args.tokenizer_output and not args.train_tokenizer:
        refuse(f"--tokenizer-output {args.tokenizer_output}: only --train-tokenizer writes a tokenizer")
    if args.train_tokenizer and not args.tokenizer_output:
        args.tokenizer_output = Path(f"{args.output}-tokenizer")
    for path in output_files(args):
        if path.is_dir():
            refuse(f"{path}: a file will be written here, but it is a folder")
        if path.exists() and not args.overwrite:
            refuse(f"{path} exists; give another name, or --overwrite to replace it")
    if args.tokenizer_output and os.path.lexists(args.tokenizer_output):
        if not args.tokenizer_output.is_dir():
            found = "a link to nothing" if args.tokenizer_output.is_symlink() else "a file"
            refuse(f"--tokenizer-output {args.tokenizer_output}: expected a new or empty folder, found {found}")
        strangers = sorted({path.name for path in args.tokenizer_output.iterdir()} - set(TOKENIZER_FILES))
        if strangers:
            refuse(f"--tokenizer-output {args.tokenizer_output}: expected a new or empty folder, found {strangers[:3]}")


def prefixes(args: argparse.Namespace) -> dict[str, str]:
    """Name of each data set, and the path prefix of its files."""
    if args.validation_fraction:
        return {"train": f"{args.output}-train", "valid": f"{args.output}-valid"}
    return {"all": args.output}


def output_files(args: argparse.Namespace) -> list[Path]:
    """The files in the order in which they take their final names: when the last file exists, all of them do."""
    files = [args.tokenizer_output / name for name in TOKENIZER_FILES] if args.train_tokenizer else []
    files += [Path(prefix + suffix) for prefix in prefixes(args).values() for suffix in (".bin", ".idx")]
    return [*files, Path(f"{args.output}.json")]
