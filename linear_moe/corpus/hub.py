"""Corpora and tokenizers that are no text files and folders of this machine.

A data set of the Hugging Face hub, a folder that the library `datasets` saved and a parquet file become JSON lines,
which the rest of the corpus tools read. A tokenizer of the hub becomes a folder of the hub's cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from linear_moe.corpus.files import CorpusError

HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
SEVERAL_SPLITS = "dataset_dict.json"
SAVED_MARKS = (SEVERAL_SPLITS, "state.json")
TOKENIZER_PATTERNS = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"]


def is_hub_name(path: Path) -> bool:
    """Whether the text is owner/name, and no path on this machine."""
    return bool(HUB_NAME.fullmatch(str(path))) and not path.exists() and not path.parent.exists()


def has_rows(path: Path) -> bool:
    """Whether an input has rows instead of texts: `rows_as_text` makes a text file of the rows."""
    if is_hub_name(path):
        return True
    return path.suffix == ".parquet" or any((path / mark).is_file() for mark in SAVED_MARKS)


def has_splits(path: Path) -> bool:
    """Whether an input is a data set of the hub, or a folder in which several splits were saved."""
    return is_hub_name(path) or (path / SEVERAL_SPLITS).is_file()


def rows_as_text(path: Path, key: str, split: str, target: Path) -> None:
    """Writes every row's text as a JSON line to ``target``.

    Args:
        path: of which `has_rows` is true.
        key: the column with the text.
        split: of a data set with several splits.

    Raises:
        CorpusError: the library `datasets` is missing, the data set cannot be read, or it has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"--input {path} needs the library datasets: pip install datasets") from error
    from tqdm import tqdm

    try:
        rows = _rows(datasets, path, split)
        with open(target, "w", encoding="utf-8") as file:
            for row in tqdm(rows, desc=f"reading {path.name}", unit=" rows", disable=None):
                if not isinstance(row.get(key), str):
                    raise CorpusError(
                        f"--input {path} has no text in a column {key!r}, only {', '.join(row)}: give --json-key"
                    )
                file.write(json.dumps({key: row[key]}, ensure_ascii=False) + "\n")
    except (CorpusError, OSError):
        raise
    except Exception as error:  # of many libraries
        raise CorpusError(f"--input {path} cannot be read: {' '.join(str(error).split())}") from error


def _rows(datasets, path: Path, split: str) -> Iterable[dict]:
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    if not is_hub_name(path):
        saved = datasets.load_from_disk(str(path))
        return saved[split] if isinstance(saved, dict) else saved
    return datasets.load_dataset(str(path), split=split, streaming=True)


def as_files(inputs: Sequence[Path], key: str, split: str, folder: Path) -> list[Path]:
    """The inputs, with a file of JSON lines in ``folder`` in place of every input that has rows."""
    files = []
    for number, path in enumerate(inputs):
        if has_rows(path):
            files.append(folder / f"{number}.jsonl")
            rows_as_text(path, key, split, files[-1])
        else:
            files.append(path)
    return files


def tokenizer_folder(path: Path) -> Path:
    """The folder of a tokenizer: ``path``, or a copy of the hub's in its cache. Raises CorpusError."""
    if not is_hub_name(path):
        return path.resolve()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), allow_patterns=TOKENIZER_PATTERNS))
    except Exception as error:  # of many libraries
        raise CorpusError(f"--tokenizer {path} cannot be fetched: {' '.join(str(error).split())}") from error
