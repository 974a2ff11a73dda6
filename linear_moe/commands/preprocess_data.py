"""Turns text into the `.bin` and `.idx` files that Megatron trains on.

The command line is linear_moe/commands/arguments/preprocess_data.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from linear_moe.commands import run_command
from linear_moe.commands.arguments.preprocess_data import (
    TOKENIZER_FILES,
    output_files,
    parse_arguments,
    prefixes,
)
from linear_moe.corpus import files as corpus_files
from linear_moe.corpus.files import BadDocuments, Chunk, CorpusError, find_files, read_chunks
from linear_moe.corpus.hub import as_files, has_rows, has_splits, tokenizer_folder
from linear_moe.corpus.tokenizer import (
    ChunkEncoder,
    EncodedChunk,
    EncodingSettings,
    TokenizerSpec,
    load_tokenizer,
    sample_texts,
    save_trained_tokenizer,
    train_tokenizer,
)
from linear_moe.corpus.writer import DatasetWriter, publish
from linear_moe.temporary import temporary_folder
from megatron_patches.child_processes import end_with_parent

CHUNKS_IN_FLIGHT = 4  # for each worker: few enough to bound the memory, enough to cover the reader's pauses (not tuned)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for data that cannot be used."""
    args = parse_arguments(argv)
    return run_command("preprocess_data.py", lambda: preprocess(args), CorpusError, note="Nothing was written.")


def preprocess(args: argparse.Namespace) -> dict:
    """Writes the data sets that `args`, from `parse_arguments`, describe. Returns the facts written to OUTPUT.json.

    Raises:
        CorpusError: the input has no document or too many bad ones, the tokenizer cannot be loaded, or a worker died.
        OSError: a file cannot be read or written. Nothing is left behind in either case.
    """
    started = time.monotonic()
    if args.split is not None and not any(map(has_splits, args.input)):
        raise CorpusError(
            f"--split {args.split}: no --input is a data set with splits, of the hub or saved by the library datasets: "
            "leave --split out"
        )
    with ExitStack() as stack:
        inputs = args.input
        if any(map(has_rows, inputs)):
            folder = stack.enter_context(temporary_folder(Path(f"{args.output}-rows")))
            inputs = as_files(inputs, args.json_key, args.split or "train", folder)
        return _preprocess(args, inputs, started)


def _preprocess(args: argparse.Namespace, inputs: Sequence[Path], started: float) -> dict:
    files = find_files(inputs, args.suffixes, partial(print, file=sys.stderr))
    if not files:
        raise CorpusError(f"no file ends in one of {args.suffixes} under {[str(path) for path in args.input]}")
    outputs = output_files(args)
    if overlap := set(map(os.path.realpath, outputs)) & set(map(os.path.realpath, files)):
        raise CorpusError(f"{sorted(overlap)[0]} is an input file and would be overwritten; give another --output")

    with ExitStack() as stack:
        staging = stack.enter_context(temporary_folder(Path(args.output)))
        tokenizer = _tokenizer(args, files)
        if args.append_eod and tokenizer.eod_id is None:
            raise CorpusError(f"the tokenizer in {tokenizer.folder!r} has no EOS token; give --no-append-eod")
        settings = EncodingSettings(tokenizer, args.json_key, args.append_eod, args.validation_fraction)
        results = stack.enter_context(_encoded(files, settings, args.workers))

        # The workers tokenize already, while this process imports the packages for writing.
        staged = [staging / path.name for path in outputs]
        if args.train_tokenizer:
            tokenizer_staging = stack.enter_context(temporary_folder(args.tokenizer_output))
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
        return load_tokenizer(tokenizer_folder(args.tokenizer), args.trust_remote_code)
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
    # New interpreters: a fork would inherit locks that threads of the tokenizer library hold, and wait for ever.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (settings,))
    try:
        pending = deque(pool.submit(_encode, chunk) for chunk in islice(chunks, CHUNKS_IN_FLIGHT * workers))

        def results() -> Iterator[EncodedChunk]:
            while pending:
                yield pending.popleft().result()
                pending.extend(pool.submit(_encode, chunk) for chunk in islice(chunks, 1))

        yield results()
    except BrokenProcessPool as error:
        raise CorpusError("a worker process died, probably because memory ran out: give fewer --workers") from error
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
                kept = (held_out if held_out and document.validation else training).add(document)
                empty += not kept
            progress.update(chunk.disk_bytes)
    return bad, empty


def _facts(args, tokenizer: TokenizerSpec, writers: dict[str, DatasetWriter], bad: BadDocuments, empty: int) -> dict:
    if not any(writer.documents for writer in writers.values()):
        raise CorpusError(_no_document(args, bad))
    for name, writer in writers.items():
        if not writer.documents:
            raise CorpusError(
                f"--validation-fraction {args.validation_fraction} leaves the {name} set without a document, of "
                f"{sum(writer.documents for writer in writers.values())}; give another fraction, or more documents"
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
        print(f"the text has too few pairs to merge: {facts['vocab_size']} tokens instead of {args.train_tokenizer}")
    print(f"bad lines: {bad.count}, empty documents: {facts['empty_documents']}, {seconds:.1f} s")
    if bad.count:
        print(bad.listing())
