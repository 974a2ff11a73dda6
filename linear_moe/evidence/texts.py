"""The sources and documentation of Python and of the installed packages, as a corpus that is split by package.

Every file belongs to a package, and every package to one side: training, or held out. A file whose lines stand mostly
in files before it is left out, whichever package it belongs to, so that no copy of a training file is held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

TRAINING, HELD_OUT = "training", "held_out"
SUFFIXES = (".py", ".pyi", ".pyx", ".pxd", ".md", ".rst", ".txt", ".h", ".hpp", ".cuh", ".c", ".cc", ".cpp", ".cu")
NAMES = ("METADATA",)  # of a distribution: its README
PACKAGE_FOLDERS = ("site-packages", "dist-packages")
SKIPPED_FOLDERS = {"__pycache__", *PACKAGE_FOLDERS}
METADATA_FOLDER = re.compile(r"(.+?)-[^-]+\.(dist|egg)-info$")
SMALLEST, LARGEST = 200, 1_000_000  # bytes of a file; larger ones are tables
LONGEST_LINE = 2000  # bytes; a file with a longer line holds data
SHORTEST_LINE = 8  # bytes of a line, without the spaces around the line, that counts in the comparison of files
LARGEST_HELD_OUT = 0.015  # of all bytes; a larger package is always training text
FILES_A_TASK = 64


class TextFile(NamedTuple):
    """A file of the installation: its package, its place below the package's root, and where to read it."""

    package: str
    name: str
    path: str
    size: int


class ReadFile(NamedTuple):
    """What a worker makes of a file: the JSON line, size and digest of its text, and hashes of its distinct lines."""

    line: bytes
    size: int
    digest: str
    line_hashes: np.ndarray


@dataclass(frozen=True)
class Side:
    """One side of the split, after files were left out.

    Attributes:
        path: of the JSON lines.
        digest: of the texts in their order.
    """

    path: Path
    files: int
    text_bytes: int
    digest: str


def roots() -> list[tuple[str, Path]]:
    """(prefix of the package names, folder) of the standard library and of every folder with installed packages.

    A folder of Python's path counts where a distribution's metadata lie in the folder: the folder of a program, such as
    this project's, has none.
    """
    found = {Path(sysconfig.get_path("stdlib")).resolve(): "python/"}
    for entry in sys.path:
        folder = Path(entry or ".").resolve()
        if folder.is_dir() and (folder.name in PACKAGE_FOLDERS or any(folder.glob("*.dist-info"))):
            found.setdefault(folder, "")
    return [(prefix, folder) for folder, prefix in found.items()]


def find_texts(places: Iterable[tuple[str, Path]]) -> list[TextFile]:
    """The text files of all packages, sorted by package and name."""
    found = []
    for prefix, root in places:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
            for name in names:
                if not name.endswith(SUFFIXES) and name not in NAMES:
                    continue
                path = os.path.join(folder, name)
                try:
                    size = os.stat(path).st_size
                except OSError:
                    continue  # a link to nothing
                if SMALLEST <= size <= LARGEST:
                    relative = os.path.relpath(path, root).replace(os.sep, "/")
                    found.append(TextFile(prefix + package_of(relative), relative, path, size))
    return sorted(found)


def package_of(relative: str) -> str:
    """The package of a file, from its path below a folder of packages. A distribution's metadata are its package's."""
    first = relative.split("/")[0]
    match = METADATA_FOLDER.match(first)
    name = match[1] if match else first.split(".")[0]
    return name.lower().replace("-", "_") or first


def held_out_packages(texts: Sequence[TextFile], share: float) -> set[str]:
    """Packages that hold at least ``share`` of all bytes together, drawn by a hash of their names.

    Packages with more than LARGEST_HELD_OUT of the bytes are not drawn, for then few packages would be held out.
    """
    sizes: dict[str, int] = {}
    for text in texts:
        sizes[text.package] = sizes.get(text.package, 0) + text.size
    total, held, names = sum(sizes.values()), 0, set()
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if held >= share * total:
            break
        if sizes[name] <= max(LARGEST_HELD_OUT, share) * total:
            names.add(name)
            held += sizes[name]
    return names


def limited(texts: Sequence[TextFile], most_bytes: int) -> list[TextFile]:
    """At most ``most_bytes`` of files, drawn by a hash of their names, in the order given."""
    drawn, total = set(), 0
    for text in sorted(texts, key=lambda text: hashlib.sha256(f"{text.package}/{text.name}".encode()).digest()):
        total += text.size
        if total > most_bytes:
            break
        drawn.add(text)
    return [text for text in texts if text in drawn]


def read_files(texts: Sequence[TextFile]) -> list[ReadFile | None]:
    """Reads files; None for a file that is not UTF-8, or whose lines are too long for text."""
    return [_read(text) for text in texts]


def _read(text: TextFile) -> ReadFile | None:
    try:
        data = Path(text.path).read_bytes()
        content = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None
    lines = data.splitlines()
    if not lines or max(map(len, lines)) > LONGEST_LINE:
        return None
    distinct = {line for line in (line.strip() for line in lines) if len(line) >= SHORTEST_LINE}
    if not distinct:
        return None
    hashes = [int.from_bytes(hashlib.blake2b(line, digest_size=8).digest(), "little") for line in distinct]
    record = json.dumps({"path": f"{text.package}/{text.name}", "text": content}, ensure_ascii=False)
    try:
        encoded = record.encode() + b"\n"
    except UnicodeEncodeError:
        return None
    return ReadFile(encoded, len(data), hashlib.sha256(data).hexdigest(), np.array(hashes, np.uint64))


def repeated_shares(hashes: Sequence[np.ndarray]) -> np.ndarray:
    """Of every file, the share of its distinct lines that stand in a file before it, left out or not."""
    counts = np.array([len(found) for found in hashes])
    every = np.concatenate(hashes)
    first = np.zeros(len(every), bool)
    first[np.unique(every, return_index=True)[1]] = True
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return 1 - np.add.reduceat(first.astype(np.int64), starts) / counts


def _read_all(texts: Sequence[TextFile], workers: int) -> Iterator[ReadFile | None]:
    tasks = [texts[i : i + FILES_A_TASK] for i in range(0, len(texts), FILES_A_TASK)]
    if workers <= 1 or len(tasks) <= 1:
        yield from read_files(texts)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn")) as pool:
        for results in pool.map(read_files, tasks):
            yield from results


def gather(
    texts: Sequence[TextFile],
    held_out: set[str],
    folder: Path,
    *,
    most_repeated: float = 0.8,
    workers: int = os.cpu_count() or 1,
) -> dict[str, Side]:
    """Writes training.jsonl and held_out.jsonl, and files.csv with every file that was kept, into a folder.

    Training files come first: a held-out file of which more than ``most_repeated`` stands in files before it, in the
    lines, is left out, as is a training file.

    Raises ValueError where a side is left without a file.
    """
    ordered = sorted(texts, key=lambda text: (text.package in held_out, text))
    pairs = [(text, read) for text, read in zip(ordered, _read_all(ordered, workers), strict=True) if read]
    if not pairs:
        raise ValueError("the Python installation holds no text file that can be read")
    repeated = repeated_shares([read.line_hashes for _, read in pairs])
    sides = {}
    with (folder / "files.csv").open("w") as listing:
        listing.write("side,package,file,bytes,sha256\n")
        for side in (TRAINING, HELD_OUT):
            digest, count, size = hashlib.sha256(), 0, 0
            path = folder / f"{side}.jsonl"
            with path.open("wb") as file:
                for (text, read), share in zip(pairs, repeated, strict=True):
                    if (text.package in held_out) != (side == HELD_OUT) or share > most_repeated:
                        continue
                    file.write(read.line)
                    digest.update(read.digest.encode())
                    count, size = count + 1, size + read.size
                    name = text.name.replace('"', "")
                    listing.write(f'{side},{text.package},"{name}",{read.size},{read.digest[:16]}\n')
            if not count:
                raise ValueError(f"no file of the Python installation is left for the {side} side")
            sides[side] = Side(path, count, size, digest.hexdigest())
    return sides


def digest_of(words: Iterable[str]) -> str:
    """One digest of several."""
    return hashlib.sha256(" ".join(words).encode()).hexdigest()
