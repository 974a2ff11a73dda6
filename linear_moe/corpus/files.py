"""Text corpora on disk, read as a stream of bounded chunks of documents.

A text file is one document. A file of JSON lines (`.jsonl`, `.ndjson`, `.json`) is one document a line. Both kinds may
be compressed (`.gz`, `.zst`). Only bytes are read here, in one process and in a fixed order; the receivers of chunks
decode UTF-8 and JSON, in parallel. A long text is the exception: this module decodes the text, cuts the text, and
passes the pieces on, so that no process holds a whole long text.
"""

import codecs
import gzip
import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from linear_moe.corpus.long_texts import pieces_of_stream

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
COMPRESSION_SUFFIXES = (".gz", ".zst")
DEFAULT_SUFFIXES = (".txt", ".md", ".jsonl")
CHUNK_BYTES = 1 << 18  # a tenth of a second of tokenizing: what an interrupted run still finishes
LONG_TEXT = 1 << 22  # bytes; a text file of more is read in pieces
LONGEST_LINE = 1 << 28  # bytes of a JSON line, which is decoded as a whole
BLOCK_BYTES = 1 << 20


class CorpusError(Exception):
    """The data cannot be used; the message is for the user."""


class BadDocument(ValueError):
    """One document is unusable; the message starts with its place, `file:line`."""


class Part(NamedTuple):
    """The place of a piece in a long document, and the size and the hash of the whole text in UTF-8."""

    first: bool
    last: bool
    text_bytes: int
    hash64: int


class Document(NamedTuple):
    """The raw bytes of one document; `line` is 0 where the document is a whole file.

    A long text comes as several of these, one after the other, each with its `part`. One that cannot be used has no
    data, and a `problem`.
    """

    path: str
    line: int
    data: bytes
    part: Part | None = None
    problem: str = ""


@dataclass
class Chunk:
    """Consecutive documents of about `CHUNK_BYTES`, and how many bytes of disk were read for them."""

    documents: list[Document] = field(default_factory=list)
    disk_bytes: int = 0


class BadDocuments:
    """Counts unusable documents, keeps the first few reports, and gives up beyond a limit."""

    SHOWN = 5

    def __init__(self, limit: int):
        self.limit = limit
        self.count = 0
        self.examples: list[str] = []

    def add(self, reports: Sequence[str]) -> None:
        """Raises CorpusError once more than `limit` documents were unusable."""
        self.count += len(reports)
        self.examples.extend(reports[: self.SHOWN - len(self.examples)])
        if self.count > self.limit:
            raise CorpusError(
                f"{self.count} bad lines, more than the {self.limit} that --max-bad-lines accepts; first ones:\n"
                + self.listing()
            )

    def listing(self) -> str:
        return "\n".join(f"  {example}" for example in self.examples)


def find_files(inputs: Iterable[Path], suffixes: Sequence[str], report: Callable[[str], None]) -> list[Path]:
    """Lists the corpus files: a file stands for itself, a folder for its files that end in one of `suffixes`.

    Folders are walked recursively and sorted by relative path, so that the order is the same on any file system.
    Compressed variants of each suffix match too; hidden files and folders do not. What is no file in a folder, such as
    a pipe or a link to nothing, is left out, and `report` is called with a line about it.
    """
    files = []
    for path in inputs:
        if not path.is_dir():
            files.append(path)
            continue
        for found in (path / relative for relative in sorted(_walk(path, suffixes))):
            if found.is_file():
                files.append(found)
            else:
                kind = "a link to nothing" if found.is_symlink() and not found.exists() else "not a regular file"
                report(f"{found} is left out: {kind}")
    return files


def _walk(root: Path, suffixes: Sequence[str]) -> Iterator[str]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and _without_compression(name).endswith(tuple(suffixes)):
                yield Path(folder, name).relative_to(root).as_posix()


def read_chunks(files: Iterable[Path]) -> Iterator[Chunk]:
    """Streams the documents of `files` in order; a chunk is larger than `CHUNK_BYTES` only by its last document, or
    piece of one."""
    chunk, size = Chunk(), 0
    for path in files:
        try:
            with _opened(path) as (stream, disk_file):
                position = 0
                for document in _documents(path, stream):
                    chunk.documents.append(document)
                    size += len(document.data)
                    if size >= CHUNK_BYTES:
                        chunk.disk_bytes += disk_file.tell() - position
                        position = disk_file.tell()
                        yield chunk
                        chunk, size = Chunk(), 0
                chunk.disk_bytes += disk_file.tell() - position
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise CorpusError(f"{path}: damaged compressed file: {error}") from error
    if chunk.documents or chunk.disk_bytes:
        yield chunk


def _documents(path: Path, stream: BinaryIO) -> Iterator[Document]:
    if _without_compression(path.name).endswith(JSON_LINES_SUFFIXES):
        yield from _json_lines(path, stream)
        return
    start = stream.read(LONG_TEXT + 1)
    if len(start) <= LONG_TEXT:
        yield Document(str(path), 0, start)
        return
    try:
        text_bytes, hash64 = _survey(path)
    except BadDocument as error:
        yield Document(str(path), 0, b"", problem=str(error))
        return
    pieces = pieces_of_stream(_decoded(path, chain([start], _blocks(stream))))
    piece, read = next(pieces), 0
    for following in chain(pieces, [None]):
        data = piece.encode()
        yield Document(str(path), 0, data, Part(read == 0, following is None, text_bytes, hash64))
        piece, read = following, read + len(data)
    if read != text_bytes:
        raise CorpusError(f"{path} has changed while it was read")


def _json_lines(path: Path, stream: BinaryIO) -> Iterator[Document]:
    number = 0
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = stream.readline(BLOCK_BYTES)
            problem = f"a line of more than {LONGEST_LINE} bytes; give its text as a file"
            yield Document(str(path), number, b"", problem=f"{path}:{number}: {problem}")
        elif not line.isspace():
            yield Document(str(path), number, line)


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        yield block


def _decoded(path: Path, blocks: Iterable[bytes]) -> Iterator[str]:
    """The text of a file in UTF-8, block by block. Raises BadDocument with the line of the first wrong byte."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = 1
    try:
        for block in blocks:
            text = decoder.decode(block)
            lines += text.count("\n")
            yield text
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _bad_utf8(path, lines, error) from error


def _bad_utf8(path: Path | str, first_line: int, error: UnicodeDecodeError) -> BadDocument:
    line = first_line + error.object[: error.start].count(b"\n")
    return BadDocument(f"{path}:{line}: invalid UTF-8, byte 0x{error.object[error.start]:02x}")


def _survey(path: Path) -> tuple[int, int]:
    """Size and `hash64` of the text of a file in UTF-8, found before its first piece is passed on: the hash says which
    data set the text belongs to. Raises BadDocument where the file is not UTF-8."""
    size, digest = 0, hashlib.blake2b(digest_size=8)
    with _opened(path) as (stream, _):
        for text in _decoded(path, _blocks(stream)):
            data = text.encode()
            size += len(data)
            digest.update(data)
    return size, int.from_bytes(digest.digest(), "big")


def hash64(data: bytes) -> int:
    """A hash of 64 bits, the same on any machine."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def document_text(document: Document, json_key: str) -> str:
    """Decodes one document, or its part; raises BadDocument, naming file and line, where it is not text."""
    if document.problem:
        raise BadDocument(document.problem)
    try:
        text = document.data.decode("utf-8" if document.part else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad_utf8(document.path, document.line or 1, error) from error
    if document.line == 0:
        return text
    try:
        return _json_text(text, json_key)
    except (ValueError, RecursionError) as error:
        raise BadDocument(f"{document.path}:{document.line}: {error}") from error


def _json_text(line: str, key: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, got {type(record).__name__}")
    if key not in record:
        raise ValueError(f"no key {key!r} among {sorted(record)[:8]}")
    text = record[key]
    if not isinstance(text, str):
        raise ValueError(f"expected a string under {key!r}, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"lone surrogate \\u{ord(text[error.start]):04x} in the text") from error
    return text


def _without_compression(name: str) -> str:
    for suffix in COMPRESSION_SUFFIXES:
        name = name.removesuffix(suffix)
    return name


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The decompressed stream, and the file on disk whose position tells the progress."""
    with open(path, "rb") as disk_file:
        if path.suffix == ".gz":
            yield gzip.GzipFile(fileobj=disk_file), disk_file
        elif path.suffix == ".zst":
            yield io.BufferedReader(_ZstdReader(disk_file), 1 << 17), disk_file
        else:
            yield disk_file, disk_file


class _ZstdReader(io.RawIOBase):
    """Decompresses any number of zstd frames.

    The library's own stream reader ends silently where a file was cut inside a frame; this one raises EOFError.
    """

    LARGEST_WINDOW = 1 << 31  # what `zstd --long=31` writes
    BLOCK = 1 << 12  # bytes, which become 128 MB at most: a repeated byte takes four bytes for 128 KB

    def __init__(self, source: BinaryIO):
        try:
            import zstandard
        except ImportError as error:
            raise CorpusError("reading .zst files needs the zstandard package: pip install zstandard") from error
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=self.LARGEST_WINDOW).decompressobj
        self._error = zstandard.ZstdError
        self._source = source
        self._frame = None
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            block = self._source.read(self.BLOCK)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends inside a zstd frame")
                return 0
            self._output = memoryview(self._decompress(block))
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _decompress(self, block: bytes) -> bytes:
        parts = []
        while block:
            self._frame = self._frame or self._new_frame()
            try:
                parts.append(self._frame.decompress(block))
            except self._error as error:
                raise EOFError(error) from error
            block = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(parts)
