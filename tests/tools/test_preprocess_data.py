"""tools/preprocess_data.py, through its `main`: Megatron's reader returns the texts, or no file is written."""

import errno
import gzip
import json
import math
import os
import resource
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from preprocessed import decoded, facts, left_in, refused, with_eod

from linear_moe.corpus import files as corpus_files
from linear_moe.corpus import writer as dataset_writer

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_json_lines_come_back_as_text(tmp_path, corpus, run, stories, tokenizer_folder, suffix):
    raw = corpus.read_bytes() + b"\n  \n"  # blank lines are no documents
    half = raw.index(b"\n", len(raw) // 2) + 1
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    source = tmp_path / f"corpus.jsonl{suffix}"
    source.write_bytes(compress(raw[:half]) + compress(raw[half:]))  # two frames, as parallel compressors write
    assert run(source) == 0
    assert left_in(tmp_path / "out") == ["data.bin", "data.idx", "data.json"]
    assert decoded(tmp_path / "out" / "data", tokenizer_folder) == with_eod(stories)
    assert facts(tmp_path / "out" / "data")["documents"] == len(stories)


def test_folder_is_read_in_order_of_its_paths(tmp_path, run, stories, tokenizer_folder):
    folder = tmp_path / "texts"
    (folder / "b" / ".git").mkdir(parents=True)
    (folder / "b" / ".git" / "x.txt").write_text("hidden")
    (folder / "c.txt").write_text(stories[0])
    (folder / "b" / "z.txt.gz").write_bytes(gzip.compress(stories[1].encode()))
    (folder / "b" / "a.md").write_bytes(b"\xef\xbb\xbf" + stories[2].encode())
    (folder / "a.py").write_text("not asked for")
    (folder / "empty.txt").write_text("")
    assert run(folder) == 0
    expected = [stories[2], stories[1], stories[0]]
    assert decoded(tmp_path / "out" / "data", tokenizer_folder) == with_eod(expected)
    assert facts(tmp_path / "out" / "data")["empty_documents"] == 1
    assert facts(tmp_path / "out" / "data")["text_bytes"] == sum(len(text.encode()) for text in expected)
    assert run(folder, "--suffixes", ".py", "--no-append-eod", output=tmp_path / "code") == 0
    assert decoded(tmp_path / "code", tokenizer_folder) == ["not asked for"]


def test_workers_change_nothing(tmp_path, corpus, run, monkeypatch, stories):
    monkeypatch.setattr(corpus_files, "CHUNK_BYTES", 300)  # dozens of chunks
    outputs = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        assert run(corpus, "--validation-fraction", "0.3", output=folder / "data", workers=workers) == 0
        assert left_in(folder) == ["data-train.bin", "data-train.idx", "data-valid.bin", "data-valid.idx", "data.json"]
        outputs.append([(folder / name).read_bytes() for name in left_in(folder)])
    assert outputs[0] == outputs[1]


def test_validation_split_is_by_text(tmp_path, corpus, run, stories, tokenizer_folder):
    assert run(corpus, "--validation-fraction", "0.3") == 0
    sets = [decoded(tmp_path / "out" / f"data-{name}", tokenizer_folder) for name in ("train", "valid")]
    assert sorted(sets[0] + sets[1]) == sorted(with_eod(stories))
    assert 0.1 < len(sets[1]) / len(stories) < 0.5
    corpus.write_text("".join(sorted(corpus.read_text().splitlines(keepends=True) * 2, reverse=True)))
    assert run(corpus, "--validation-fraction", "0.3", "--overwrite") == 0
    assert set(decoded(tmp_path / "out" / "data-valid", tokenizer_folder)) == set(sets[1])
    report = facts(tmp_path / "out" / "data")
    assert report["unigram_entropy_nats"] == report["datasets"]["valid"]["unigram_entropy_nats"]


def test_a_split_without_documents_is_refused(tmp_path, run, capsys):
    (tmp_path / "one.txt").write_text("one document")
    assert run(tmp_path / "one.txt", "--validation-fraction", "0.001") == 1
    assert "valid set without a document" in capsys.readouterr().err
    assert left_in(tmp_path / "out") == []


BAD_LINES = [
    (b'{"text": ', "invalid JSON"),
    (b'{"body": "x"}', "no key 'text' among ['body']"),
    (b'{"text": 3}', "expected a string under 'text', got int"),
    (b"[1]", "expected a JSON object, got list"),
    (b'{"text": "\xff"}', "invalid UTF-8, byte 0xff"),
    (rb'{"text": "\ud800"}', "lone surrogate"),
    (b"[" * 100_000, "recursion"),
]


def test_bad_lines_are_counted_and_located(tmp_path, corpus, run, stories, capsys):
    lines = corpus.read_bytes().splitlines()
    source = tmp_path / "bad.jsonl"
    for bad, reason in BAD_LINES:
        source.write_bytes(b"\n".join([*lines[:2], bad, *lines[2:]]))
        assert run(source, "--overwrite") == 0
        printed = capsys.readouterr().out
        assert "bad lines: 1" in printed and f"{source}:3: " in printed and reason in printed
        assert facts(tmp_path / "out" / "data")["documents"] == len(stories)
        assert facts(tmp_path / "out" / "data")["bad_lines"] == 1


def test_bad_text_file_names_its_line(tmp_path, run, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("fine")
    (folder / "bad.txt").write_bytes(b"one\ntwo\nthr\xe9e\n")
    assert run(folder) == 0
    assert f"{folder / 'bad.txt'}:3: invalid UTF-8, byte 0xe9" in capsys.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_bad_lines(tmp_path, corpus, run, capsys, monkeypatch, workers):
    monkeypatch.setattr(corpus_files, "CHUNK_BYTES", 300)
    corpus.write_bytes(corpus.read_bytes() + b"{\n" * 4)
    assert run(corpus, "--max-bad-lines", 3, workers=workers) == 1
    error = capsys.readouterr().err
    assert "more than the 3 that --max-bad-lines accepts" in error and f"{corpus}:65: invalid JSON" in error
    assert left_in(tmp_path / "out") == []
    assert run(corpus, "--max-bad-lines", 4) == 0


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.ZstdCompressor().compress])
@pytest.mark.parametrize("damage", ["cut", "noise"])
def test_damaged_compressed_file(tmp_path, corpus, run, capsys, compress, damage):
    source = tmp_path / ("x.jsonl.gz" if compress is gzip.compress else "x.jsonl.zst")
    data = compress(corpus.read_bytes())
    source.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no compressed file")
    assert run(source) == 1
    assert f"{source}: damaged compressed file" in capsys.readouterr().err
    assert left_in(tmp_path / "out") == []


@pytest.mark.parametrize("content", ["", "\n\n", '{"text": ""}\n'])
def test_empty_corpus(tmp_path, run, capsys, content):
    source = tmp_path / "empty.jsonl"
    source.write_text(content)
    assert run(source) == 1
    assert run(source, tokenizer=("--train-tokenizer", 300)) == 1
    assert "no document with text" in capsys.readouterr().err
    (tmp_path / "folder").mkdir()
    assert run(tmp_path / "folder") == 1
    assert "no file ends in one of ['.txt', '.md', '.jsonl']" in capsys.readouterr().err
    assert left_in(tmp_path / "out") == []


def test_existing_output_is_kept(tmp_path, corpus, run, capsys):
    assert run(corpus) == 0
    before = [(tmp_path / "out" / name).read_bytes() for name in left_in(tmp_path / "out")]
    corpus.write_text(json.dumps({"text": "other"}))
    assert refused(run, corpus) == 2
    assert "data.bin exists; give another name, or --overwrite" in capsys.readouterr().err
    assert [(tmp_path / "out" / name).read_bytes() for name in left_in(tmp_path / "out")] == before
    assert run(corpus, "--overwrite") == 0
    assert facts(tmp_path / "out" / "data")["documents"] == 1


@pytest.mark.parametrize("method", ["add_document", "finalize"])
@pytest.mark.parametrize(
    "failure, code", [(OSError(errno.ENOSPC, "No space left on device"), 1), (KeyboardInterrupt, 130)]
)
def test_failure_while_writing_leaves_nothing_new(tmp_path, corpus, run, capsys, monkeypatch, method, failure, code):
    assert run(corpus) == 0
    before = {name: (tmp_path / "out" / name).read_bytes() for name in left_in(tmp_path / "out")}
    original, calls = getattr(IndexedDatasetBuilder, method), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise failure
        return original(*arguments)

    monkeypatch.setattr(IndexedDatasetBuilder, method, failing)
    training = ("--train-tokenizer", 300, "--overwrite", "--validation-fraction", "0.3")
    assert run(corpus, tokenizer=training) == code
    assert ("No space left on device" if code == 1 else "interrupted") in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in left_in(tmp_path / "out")} == before


def test_full_disk(tmp_path, run, capsys):
    (tmp_path / "big.txt").write_text("a b c d e f g " * 20_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code = run(tmp_path / "big.txt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert "File too large" in capsys.readouterr().err
    assert left_in(tmp_path / "out") == []


def test_trained_tokenizer_is_megatrons(tmp_path, corpus, run, stories):
    assert run(corpus, tokenizer=("--train-tokenizer", 400)) == 0
    folder = tmp_path / "out" / "data-tokenizer"
    report = facts(tmp_path / "out" / "data")
    assert (report["vocab_size"], report["tokenizer"]) == (400, str(folder))
    options = dict.fromkeys(["metadata_path", "special_tokens", "chat_template", "vocab_file", "merge_file"])
    flags = [
        "tokenizer_hf_no_use_fast",
        "trust_remote_code",
        "tokenizer_hf_no_include_special_tokens",
        "pad_vocab_size",
    ]
    tokenizer = build_tokenizer(
        Namespace(
            tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), **options, **dict.fromkeys(flags, False)
        )
    )
    assert (tokenizer.vocab_size, tokenizer.eod) == (report["vocab_size"], report["eod_id"])
    data = IndexedDataset(str(tmp_path / "out" / "data"))
    for tokens, text in zip(data, stories, strict=True):
        assert tokens.dtype == np.uint16
        assert tokens.tolist() == [*tokenizer.tokenize(text), tokenizer.eod]
        assert tokenizer.detokenize(tokens[:-1].tolist()) == text

    assert run(corpus, output=tmp_path / "again", tokenizer=("--train-tokenizer", 400)) == 0
    assert (tmp_path / "again-tokenizer" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_tokenizer_output_folder_of_something_else_is_refused(tmp_path, corpus, run, capsys):
    assert refused(run, corpus, tokenizer=("--train-tokenizer", 300, "--tokenizer-output", corpus.parent)) == 2
    assert "expected a new or empty folder, found ['corpus.jsonl']" in capsys.readouterr().err


def test_tokenizer_without_eos(tmp_path, corpus, run, capsys, tokenizer_folder, stories):
    folder = tmp_path / "no-eos"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    assert run(corpus, tokenizer=("--tokenizer", folder)) == 1
    assert "has no EOS token; give --no-append-eod" in capsys.readouterr().err
    assert run(corpus, "--no-append-eod", tokenizer=("--tokenizer", folder)) == 0
    assert decoded(tmp_path / "out" / "data", folder) == stories


def test_folder_without_tokenizer(tmp_path, corpus, run, capsys):
    assert run(corpus, tokenizer=("--tokenizer", corpus.parent)) == 1
    assert f"cannot load a Hugging Face tokenizer from '{corpus.parent}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (("--input", "/no/such/corpus"), "--input /no/such/corpus: no such file or folder"),
        (("--tokenizer", "/no/such/tokenizer"), "--tokenizer /no/such/tokenizer: no such folder"),
        (("--output", "/tmp/"), "--output /tmp/: expected a path without extension"),
        (("--suffixes", "txt"), "--suffixes txt: expected a leading dot"),
        (("--validation-fraction", "1"), "'1': expected a number from 0 up to"),
        (("--workers", "0"), "'0': expected a whole number of at least 1"),
        (("--workers", "1000000"), "'1000000': expected a whole number of at most 1024"),
        (("--tokenizer-bytes", "9" * 5000), "expected a whole number of at least 1"),
        (("--tokenizer-output", "x"), "only --train-tokenizer writes a tokenizer"),
        (("--train-tokenizer", "300"), "not allowed with argument --tokenizer"),
    ],
)
def test_wrong_command_line(corpus, run, capsys, options, message):
    assert refused(run, corpus, *options) == 2
    assert message in capsys.readouterr().err


def test_unigram_entropy(tmp_path, run, tokenizer_folder):
    assert math.isclose(dataset_writer.unigram_entropy(np.array([2, 0, 1, 1])), 1.5 * math.log(2))
    assert dataset_writer.unigram_entropy(np.array([0, 5])) == 0
    (tmp_path / "x.txt").write_text("q" * 3)  # bytes that the tokenizer does not merge
    assert run(tmp_path / "x.txt") == 0
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))  # three letters and the end of the document
    assert math.isclose(facts(tmp_path / "out" / "data")["unigram_entropy_nats"], expected)


def test_script(tmp_path, corpus, tokenizer_folder):
    """From a shell with two workers. A wrong command line is refused without loading torch."""
    script = [sys.executable, TOOLS / "preprocess_data.py"]
    data = ["--input", corpus, "--tokenizer", tokenizer_folder]
    finished = subprocess.run([*script, *data, "--output", tmp_path / "x"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert f"{tmp_path / 'x'}.bin/.idx: 64 documents" in finished.stdout
    heavy = "{'torch', 'transformers'} & sys.modules.keys()"
    light = f"import sys, linear_moe.commands.preprocess_data; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", light], cwd=TOOLS.parent).returncode == 0


def test_what_is_no_file_is_left_out_or_refused(tmp_path, run, capsys, tokenizer_folder):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    (folder / "dangling.txt").symlink_to(tmp_path / "nothing")
    (folder / "loop.txt").symlink_to("loop.txt")
    (folder / "link.txt").symlink_to("a.txt")
    os.mkfifo(folder / "pipe.txt")
    assert run(folder) == 0
    error = capsys.readouterr().err
    assert f"{folder / 'dangling.txt'} is left out: a link to nothing" in error
    assert f"{folder / 'loop.txt'} is left out: a link to nothing" in error
    assert f"{folder / 'pipe.txt'} is left out: not a regular file" in error
    assert decoded(tmp_path / "out" / "data", tokenizer_folder) == with_eod(["text"] * 2)
    for path in (folder / "pipe.txt", "/dev/zero"):
        assert refused(run, path) == 2
        assert f"--input {path}: expected a regular file or a folder" in capsys.readouterr().err


def test_vocabulary_beyond_memory_is_refused(corpus, run, capsys):
    assert refused(run, corpus, tokenizer=("--train-tokenizer", 10**12)) == 2
    assert "'1000000000000': expected a whole number of at most 1048576" in capsys.readouterr().err


def test_parquet_files_and_saved_data_sets(run, tmp_path, stories, capsys):
    import datasets

    rows = datasets.Dataset.from_dict({"text": stories, "number": list(range(len(stories)))})
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    rows.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in stories))
    outputs = {}
    for name in ("lines.jsonl", "rows.parquet", "saved"):
        assert run(tmp_path / name, output=tmp_path / "out" / name) == 0, capsys.readouterr().err
        outputs[name] = (tmp_path / "out" / f"{name}.bin").read_bytes()
    assert outputs["rows.parquet"] == outputs["saved"] == outputs["lines.jsonl"]
    assert not list((tmp_path / "out").glob("*rows*jsonl")) and not list((tmp_path / "out").glob("*-rows*"))
    assert run(tmp_path / "rows.parquet", "--json-key", "number", output=tmp_path / "out" / "number") == 1
    assert "has no text in a column 'number', only text, number: give --json-key" in capsys.readouterr().err


def test_names_of_the_hub_are_no_paths(tmp_path, monkeypatch):
    from linear_moe.corpus.hub import is_hub_name

    monkeypatch.chdir(tmp_path)
    assert is_hub_name(Path("owner/name")) and is_hub_name(Path("owner/name-1.5b"))
    assert not any(map(is_hub_name, (Path("name"), Path("a/b/c"), tmp_path / "x", Path("../name"), Path("./a"))))
    (tmp_path / "owner").mkdir()
    assert not is_hub_name(Path("owner/name"))
