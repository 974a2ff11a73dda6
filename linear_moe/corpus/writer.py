"""Megatron's `.bin` and `.idx` files: written beside their place, renamed into it when all are complete."""

import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from linear_moe.corpus.files import CorpusError
from linear_moe.corpus.tokenizer import EncodedDocument

LONGEST_DOCUMENT = 2**31 - 1  # tokens


class DatasetWriter:
    """One `.bin` and `.idx` pair in the making, with its statistics."""

    def __init__(self, prefix: Path, vocab_size: int):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the import tells of optional packages for training
            from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))
        self._length = 0  # tokens of the document that is not complete
        self.documents = 0
        self.text_bytes = 0
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)

    def add(self, document: EncodedDocument) -> bool:
        """Appends a document, or the next piece of a long one. Returns False at the end of one whose text has no token,
        of which nothing is kept."""
        self._length += len(document.tokens)
        if self._length > LONGEST_DOCUMENT:
            raise CorpusError(f"a document of more than {LONGEST_DOCUMENT} tokens: Megatron's index counts no further")
        if document.last and self._length == document.tail:
            self._length = 0
            return False
        np.add.at(self.token_counts, document.tokens, 1)
        if not document.last:
            self.builder.data_file.write(document.tokens.astype(self.builder.dtype).tobytes())
            return True
        self.builder.add_document(document.tokens, [self._length])
        self._length = 0
        self.documents += 1
        self.text_bytes += document.text_bytes
        return True

    def finish(self) -> None:
        """Writes the index; both files are on disk, not only in memory, when this returns."""
        self.builder.finalize(f"{self.prefix}.idx")
        for suffix in (".bin", ".idx"):
            with open(f"{self.prefix}{suffix}", "rb") as file:
                os.fsync(file.fileno())

    def abandon(self) -> None:
        with suppress(OSError):
            self.builder.data_file.close()

    def facts(self) -> dict:
        tokens = int(self.token_counts.sum())
        return {
            "documents": self.documents,
            "tokens": tokens,
            "text_bytes": self.text_bytes,
            "bytes_per_token": round(self.text_bytes / tokens, 4),
            "unigram_entropy_nats": unigram_entropy(self.token_counts),
        }


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats of tokens drawn by `counts`: the loss of the best model that ignores the context."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def publish(staged: Sequence[Path], outputs: Sequence[Path]) -> None:
    """Gives the complete files their names, all renames. An old index never meets new tokens."""
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    for path in outputs:
        if path.suffix in (".idx", ".json"):
            path.unlink(missing_ok=True)
    for source, target in zip(staged, outputs, strict=True):
        os.replace(source, target)
