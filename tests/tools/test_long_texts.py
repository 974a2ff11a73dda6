"""tools/preprocess_data.py on texts that it reads in pieces: the output is that of the whole, the memory is bounded."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard
from preprocessed import decoded, facts, with_eod

from linear_moe.corpus import files as corpus_files
from linear_moe.corpus import long_texts

TOOLS = Path(__file__).parents[2] / "tools"


def small_pieces(monkeypatch) -> None:
    """Long texts and pieces of a few hundred bytes, in this process."""
    monkeypatch.setattr(corpus_files, "LONG_TEXT", 700)
    monkeypatch.setattr(corpus_files, "BLOCK_BYTES", 61)
    monkeypatch.setattr(long_texts.pieces_of, "__defaults__", (300,))
    monkeypatch.setattr(long_texts.pieces_of_stream, "__defaults__", (300,))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_long_text_is_one_document_with_the_same_tokens(tmp_path, run, stories, monkeypatch, suffix):
    """Read in pieces or as a whole: the files and the split are the same, byte by byte."""
    compress = {".txt": bytes, ".txt.gz": gzip.compress, ".txt.zst": zstandard.ZstdCompressor().compress}[suffix]
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        text = "".join(stories[i:] + stories[:i])
        (folder / f"{i}{suffix}").write_bytes(compress(b"\xef\xbb\xbf" * (i == 1) + text.encode()))
    (folder / f"short{suffix}").write_bytes(compress(b"short"))
    outputs = []
    for name in ("whole", "pieces"):
        output = tmp_path / name / "data"
        assert run(folder, "--validation-fraction", "0.5", output=output) == 0
        assert run(folder, output=tmp_path / name / "trained", tokenizer=("--train-tokenizer", 400)) == 0
        files = sorted(path for path in output.parent.rglob("*") if path.is_file() and path.suffix != ".json")
        outputs.append([(path.name, path.read_bytes()) for path in files])
        outputs[-1].append((output.parent / "trained-tokenizer" / "tokenizer.json").read_bytes())
        assert facts(output)["documents"] == 7
        assert min(dataset["documents"] for dataset in facts(output)["datasets"].values()) >= 1
        text_bytes = 6 * sum(len(text.encode()) for text in stories) + 5
        assert facts(output)["text_bytes"] == text_bytes
        small_pieces(monkeypatch)
    assert outputs[0] == outputs[1]


def test_bad_long_text_names_its_line_and_leaves_nothing(tmp_path, run, stories, monkeypatch, capsys, tokenizer_folder):
    small_pieces(monkeypatch)
    folder = tmp_path / "texts"
    folder.mkdir()
    text = "".join(stories).encode()
    lines = text.count(b"\n")
    (folder / "a.txt").write_bytes(text)
    (folder / "b.txt").write_bytes(text + b"\xe9 end\n")
    (folder / "c.txt").write_bytes(text + b"\xf0\x9f\x99")  # cut inside a character
    (folder / "d.txt").write_bytes(text)
    assert run(folder) == 0
    printed = capsys.readouterr().out
    assert f"{folder / 'b.txt'}:{lines + 1}: invalid UTF-8, byte 0xe9" in printed
    assert f"{folder / 'c.txt'}:{lines + 1}: invalid UTF-8, byte 0xf0" in printed
    assert decoded(tmp_path / "out" / "data", tokenizer_folder) == with_eod(["".join(stories)] * 2)


def test_long_text_without_a_token_is_empty(tmp_path, run, monkeypatch, tokenizer_folder):
    """With a tokenizer that drops blanks, a long text of them leaves no lone end-of-document token."""
    small_pieces(monkeypatch)
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    definition["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    folder = tmp_path / "strips"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    (folder / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(" " * 2000)
    (tmp_path / "texts" / "b.txt").write_text("text")
    (tmp_path / "texts" / "c.txt").write_text(" " * 2000 + "text")
    assert run(tmp_path / "texts", tokenizer=("--tokenizer", folder)) == 0
    assert decoded(tmp_path / "out" / "data", folder) == with_eod(["text", "text"])
    assert facts(tmp_path / "out" / "data")["empty_documents"] == 1


def test_memory_does_not_grow_with_a_text(tmp_path, tokenizer_folder):
    """A compressed file of 5 MB in pieces of 64 KB. As a whole the text would take 250 MB."""
    text = "".join(f"{i} memory {i * i % 97}: what the sequence has said\n" for i in range(120_000))
    source = tmp_path / "long.txt.gz"
    source.write_bytes(gzip.compress(text.encode(), 1))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from linear_moe.corpus import files, long_texts, tokenizer\n"
        "long_texts.pieces_of.__defaults__ = long_texts.pieces_of_stream.__defaults__ = (1 << 16,)\n"
        "tokenizer.LONGEST_PIECE = files.BLOCK_BYTES = files.LONG_TEXT = 1 << 16\n"
        "spec = tokenizer.load_tokenizer(Path(sys.argv[1]))\n"
        "encoder = tokenizer.ChunkEncoder(tokenizer.EncodingSettings(spec, 'text', True, 0.0))\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10\n"
        "before, tokens = peak(), 0\n"
        "for chunk in files.read_chunks([Path(sys.argv[2])]):\n"
        "    tokens += sum(len(document.tokens) for document in encoder(chunk).documents)\n"
        "print(tokens, peak() - before)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, tokenizer_folder, source],
        capture_output=True, text=True, cwd=TOOLS.parent, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    tokens, megabytes = map(int, finished.stdout.split())
    assert tokens > 1_000_000
    assert megabytes < 100


def test_long_line_is_a_bad_line(tmp_path, corpus, run, stories, capsys, monkeypatch):
    monkeypatch.setattr(corpus_files, "LONGEST_LINE", 2000)
    lines = corpus.read_bytes().splitlines()
    corpus.write_bytes(b"\n".join([*lines[:2], b'{"text": "' + b"x" * 5000 + b'"}', *lines[2:]]))
    assert run(corpus) == 0
    assert f"{corpus}:3: a line of more than 2000 bytes; give its text as a file" in capsys.readouterr().out
    assert facts(tmp_path / "out" / "data")["documents"] == len(stories)
