"""Turns text into the `.bin` and `.idx` files that Megatron trains on.

    python tools/preprocess_data.py --input corpus.jsonl --output data/corpus --train-tokenizer 4096
    python tools/preprocess_data.py --input texts/ --suffixes .md .py --output data/texts --tokenizer tokenizer/

Reads text files, JSON lines, either of them compressed, and folders of these. Writes OUTPUT.bin and OUTPUT.idx, or
OUTPUT-train.* and OUTPUT-valid.* with --validation-fraction, and OUTPUT.json with the facts about them. The output
does not depend on the number of workers. Files appear under their names only when all of them are complete.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from linear_moe.corpus import files as corpus_files
from linear_moe.corpus.files import DEFAULT_SUFFIXES, BadDocuments, Chunk, CorpusError, find_files, read_chunks
from linear_moe.corpus.tokenizer import (
    SMALLEST_VOCABULARY,
    ChunkEncoder,
    EncodedChunk,
    EncodingSettings,
    TokenizerSpec,
    load_tokenizer,
    sample_texts,
    save_trained_tokenizer,
    train_tokenizer,
)
from linear_moe.corpus.writer import DatasetWriter, publish, staging_folder
from megatron_patches.child_processes import end_with_parent

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CHUNKS_IN_FLIGHT = 4  # for each worker: bounds the memory, and hides the reader's pauses


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns 0, or 1 for data that cannot be used. Raises SystemExit(2) for a wrong command line."""
    args = parse_arguments(argv)
    try:
        preprocess(args)
    except CorpusError as error:
        return _failed(error)
    except OSError as error:
        return _failed(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except BrokenProcessPool:
        return _failed("a worker process died, most likely for want of memory: try fewer --workers")
    except KeyboardInterrupt:
        _failed("interrupted")
        return 130
    return 0


def _failed(reason) -> int:
    print(f"preprocess_data.py: {reason}\nNothing was written.", file=sys.stderr)
    return 1


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--input", nargs="+", type=Path, required=True, metavar="PATH", help="files or folders of text")
    data.add_argument("--output", required=True, metavar="PREFIX", help="path of the output files, without extension")
    data.add_argument(
        "--suffixes",
        nargs="+",
        default=list(DEFAULT_SUFFIXES),
        metavar="SUFFIX",
        help="which files of a folder to read; compressed ones (.gz, .zst) of these are read too",
    )
    data.add_argument("--json-key", default="text", help="where a JSON line keeps its text")
    data.add_argument(
        "--max-bad-lines", type=_whole(0), default=1000, help="give up when more lines or files are unusable"
    )
    data.add_argument(
        "--validation-fraction",
        type=_fraction,
        default=0.0,
        metavar="F",
        help="share of the documents to set apart for validation, chosen by a hash of their text",
    )
    data.add_argument("--overwrite", action="store_true", help="replace output files that exist")
    tokens = parser.add_argument_group("tokens")
    source = tokens.add_mutually_exclusive_group(required=True)
    source.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of a Hugging Face tokenizer")
    source.add_argument(
        "--train-tokenizer",
        type=_whole(SMALLEST_VOCABULARY),
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE tokenizer on the input",
    )
    tokens.add_argument(
        "--tokenizer-output", type=Path, metavar="DIR", help="folder for a trained tokenizer [PREFIX-tokenizer]"
    )
    tokens.add_argument(
        "--tokenizer-bytes", type=_whole(1), default=1 << 25, help="size of the sample a tokenizer is trained on"
    )
    tokens.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the tokenizer's EOS token",
    )
    parser.add_argument(
        "--workers", type=_whole(1), default=os.cpu_count(), help="tokenizing processes; 1 stays in this one"
    )
    args = parser.parse_args(argv)
    _check(args, parser.error)
    return args


def _check(args: argparse.Namespace, refuse: Callable[[str], None]) -> None:
    for path in args.input:
        if not path.exists():
            refuse(f"--input {path}: no such file or folder")
    for suffix in args.suffixes:
        if not suffix.startswith("."):
            refuse(f"--suffixes {suffix}: expected a leading dot, as in .txt")
    if args.output.endswith("/") or Path(args.output).name in ("", ".", ".."):
        refuse(f"--output {args.output}: expected a path without extension, such as data/corpus, not a folder")
    if args.tokenizer and not args.tokenizer.is_dir():
        refuse(f"--tokenizer {args.tokenizer}: no such folder; expected one that save_pretrained wrote")
    if args.tokenizer_output and not args.train_tokenizer:
        refuse(f"--tokenizer-output {args.tokenizer_output}: only --train-tokenizer writes a tokenizer")
    if args.train_tokenizer and not args.tokenizer_output:
        args.tokenizer_output = Path(f"{args.output}-tokenizer")
    for path in output_files(args):
        if path.is_dir():
            refuse(f"{path}: a file will be written here, but it is a folder")
        if path.exists() and not args.overwrite:
            refuse(f"{path} exists; give another name, or --overwrite to replace it")
    if args.tokenizer_output and args.tokenizer_output.exists():
        if not args.tokenizer_output.is_dir():
            refuse(f"--tokenizer-output {args.tokenizer_output}: expected a new or empty folder, found a file")
        strangers = sorted({path.name for path in args.tokenizer_output.iterdir()} - set(TOKENIZER_FILES))
        if strangers:
            refuse(f"--tokenizer-output {args.tokenizer_output}: expected a new or empty folder, found {strangers[:3]}")


def _whole(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least {least}")
        return int(text)

    return parse


def _fraction(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 up to, but not including, 1")


def prefixes(args: argparse.Namespace) -> dict[str, str]:
    """Name of each data set, and the path prefix of its files."""
    if args.validation_fraction:
        return {"train": f"{args.output}-train", "valid": f"{args.output}-valid"}
    return {"all": args.output}


def output_files(args: argparse.Namespace) -> list[Path]:
    """In the order in which they take their final names: whoever sees the last one may trust the others."""
    files = [args.tokenizer_output / name for name in TOKENIZER_FILES] if args.train_tokenizer else []
    files += [Path(prefix + suffix) for prefix in prefixes(args).values() for suffix in (".bin", ".idx")]
    return [*files, Path(f"{args.output}.json")]


def preprocess(args: argparse.Namespace) -> dict:
    """Does what `args`, from `parse_arguments`, say; returns the facts written to OUTPUT.json.

    Raises:
        CorpusError: the input has no document, too many bad ones, or the tokenizer cannot be loaded.
        OSError: a file cannot be read or written. Nothing is left behind in either case.
    """
    started = time.monotonic()
    files = find_files(args.input, args.suffixes)
    if not files:
        raise CorpusError(f"no file ends in one of {args.suffixes} under {[str(path) for path in args.input]}")
    outputs = output_files(args)
    if overlap := {path.resolve() for path in outputs} & {path.resolve() for path in files}:
        raise CorpusError(f"{sorted(overlap)[0]} is an input file and would be overwritten; give another --output")

    with ExitStack() as stack:
        staging = stack.enter_context(staging_folder(Path(args.output)))
        tokenizer = _tokenizer(args, files)
        if args.append_eod and tokenizer.eod_id is None:
            raise CorpusError(f"the tokenizer in {tokenizer.folder!r} has no EOS token; give --no-append-eod")
        settings = EncodingSettings(tokenizer, args.json_key, args.append_eod, args.validation_fraction)
        results = stack.enter_context(_encoded(files, settings, args.workers))

        # From here on the workers are busy, while this process imports what it needs for writing.
        staged = [staging / path.name for path in outputs]
        if args.train_tokenizer:
            tokenizer_staging = stack.enter_context(staging_folder(args.tokenizer_output))
            save_trained_tokenizer(tokenizer, tokenizer_staging)
            staged[: len(TOKENIZER_FILES)] = [tokenizer_staging / name for name in TOKENIZER_FILES]
        writers = {}
        for name, prefix in prefixes(args).items():
            writers[name] = DatasetWriter(staging / Path(prefix).name, tokenizer.vocab_size)
            stack.callback(writers[name].abandon)
        bad, empty = _write(results, writers, args.max_bad_lines, sum(path.stat().st_size for path in files))
        facts = _facts(args, tokenizer, writers, bad, empty)
        staged[-1].write_text(json.dumps(facts, indent=2) + "\n")
        publish(staged, outputs)
    _report(args, facts, bad, time.monotonic() - started)
    return facts


def _tokenizer(args: argparse.Namespace, files: list[Path]) -> TokenizerSpec:
    if not args.train_tokenizer:
        return load_tokenizer(args.tokenizer.resolve())
    bad = BadDocuments(args.max_bad_lines)
    texts = sample_texts(read_chunks(files), args.json_key, args.tokenizer_bytes, bad)
    if not any(texts):
        raise CorpusError(_no_document(args, bad))
    return train_tokenizer(texts, args.train_tokenizer, args.tokenizer_output.resolve())


def _no_document(args: argparse.Namespace, bad: BadDocuments) -> str:
    message = f"no document with text in {[str(path) for path in args.input]}, {bad.count} bad lines"
    return f"{message}:\n{bad.listing()}" if bad.count else message


_encoder: ChunkEncoder | None = None


def _start_worker(settings: EncodingSettings) -> None:
    global _encoder
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = ChunkEncoder(settings)


def _encode(chunk: Chunk) -> EncodedChunk:
    return _encoder(chunk)


@contextmanager
def _encoded(files: list[Path], settings: EncodingSettings, workers: int) -> Iterator[Iterator[EncodedChunk]]:
    """The encoded chunks in the order of `files`; the first ones are under way when the context is entered."""
    chunks = read_chunks(files)
    workers = min(workers, math.ceil(sum(path.stat().st_size for path in files) / corpus_files.CHUNK_BYTES))
    if workers <= 1:
        yield map(ChunkEncoder(settings), chunks)
        return
    # A fresh interpreter: a fork would inherit the tokenizer library's threads, locked for ever.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (settings,))
    try:
        pending = deque(pool.submit(_encode, chunk) for chunk in islice(chunks, CHUNKS_IN_FLIGHT * workers))

        def results() -> Iterator[EncodedChunk]:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_encode, chunk) for chunk in islice(chunks, 1))

        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


def _write(
    results: Iterator[EncodedChunk], writers: dict[str, DatasetWriter], max_bad: int, disk_bytes: int
) -> tuple[BadDocuments, int]:
    bad, empty = BadDocuments(max_bad), 0
    held_out = writers.get("valid")
    training = writers.get("train") or writers["all"]
    with tqdm(total=disk_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None) as progress:
        for chunk in results:
            bad.add(chunk.bad)
            empty += chunk.empty
            for document in chunk.documents:
                (held_out if held_out and document.validation else training).add(document)
            progress.update(chunk.disk_bytes)
    return bad, empty


def _facts(args, tokenizer: TokenizerSpec, writers: dict[str, DatasetWriter], bad: BadDocuments, empty: int) -> dict:
    if not any(writer.documents for writer in writers.values()):
        raise CorpusError(_no_document(args, bad))
    for name, writer in writers.items():
        if not writer.documents:
            raise CorpusError(
                f"--validation-fraction {args.validation_fraction} leaves the {name} set without a document, of "
                f"{sum(writer.documents for writer in writers.values())}; change it, or give more documents"
            )
        writer.finish()
    datasets = {name: {"prefix": writers[name].prefix.name, **writers[name].facts()} for name in writers}
    tokens = sum(dataset["tokens"] for dataset in datasets.values())
    text_bytes = sum(dataset["text_bytes"] for dataset in datasets.values())
    return {
        "documents": sum(dataset["documents"] for dataset in datasets.values()),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "bytes_per_token": round(text_bytes / tokens, 4),
        "unigram_entropy_nats": datasets["valid" if "valid" in datasets else "all"]["unigram_entropy_nats"],
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "append_eod": args.append_eod,
        "tokenizer": tokenizer.folder,
        "bad_lines": bad.count,
        "empty_documents": empty,
        "datasets": datasets,
    }


def _report(args: argparse.Namespace, facts: dict, bad: BadDocuments, seconds: float) -> None:
    for dataset in facts["datasets"].values():
        print(
            f"{Path(args.output).parent / dataset['prefix']}.bin/.idx: {dataset['documents']} documents, "
            f"{dataset['tokens']} tokens, {dataset['bytes_per_token']:.2f} bytes/token, "
            f"unigram entropy {dataset['unigram_entropy_nats']:.4f} nats"
        )
    print(f"tokenizer: {facts['tokenizer']}, vocabulary {facts['vocab_size']}, end of document {facts['eod_id']}")
    if args.train_tokenizer and facts["vocab_size"] < args.train_tokenizer:
        print(f"the text has no more to merge: {facts['vocab_size']} tokens instead of {args.train_tokenizer}")
    print(f"bad lines: {bad.count}, empty documents: {facts['empty_documents']}, {seconds:.1f} s")
    if bad.count:
        print(bad.listing())
