"""What tools/preprocess_data.py refuses, writes and leaves."""

import json
import os
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer


def refused(run, *arguments, **keywords) -> int:
    with pytest.raises(SystemExit) as exit_:
        run(*arguments, **keywords)
    return exit_.value.code


def decoded(prefix: Path, tokenizer_folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    data = IndexedDataset(str(prefix))
    assert list(data.document_indices) == list(range(len(data) + 1))
    return [tokenizer.decode(data[i]) for i in range(len(data))]


def facts(prefix: Path) -> dict:
    return json.loads(Path(f"{prefix}.json").read_text())


def left_in(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def with_eod(texts) -> list[str]:
    return [text + "<|endoftext|>" for text in texts]
