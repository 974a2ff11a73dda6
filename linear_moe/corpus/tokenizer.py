"""From text to token ids: Hugging Face tokenizers loaded or trained, and the work of one tokenizing process.

`transformers` is imported late: it brings torch along, half a gigabyte in every worker, and a worker needs only the
`tokenizers` library underneath.
"""

import heapq
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from linear_moe.corpus.files import BadDocument, BadDocuments, Chunk, CorpusError, document_text, hash64
from linear_moe.corpus.long_texts import LONGEST_PIECE, pieces_of
from linear_moe.tokens import encode_texts, end_of_document, make_portable, vocabulary_size

EOS_TOKEN = "<|endoftext|>"


class EncodedDocument(NamedTuple):
    """Token ids of one document, or of the next piece of a long one.

    Attributes:
        tokens: the ids.
        text_bytes: size of the whole document's text in UTF-8; 0 in a piece that others follow.
        validation: whether the document belongs to the validation set.
        last: whether it ends here.
        tail: how many of the tokens stand for its end and not for its text.
    """

    tokens: np.ndarray
    text_bytes: int
    validation: bool
    last: bool = True
    tail: int = 0


@dataclass
class EncodedChunk:
    """What a worker makes of one Chunk. `empty` counts documents without a single token, which are left out."""

    disk_bytes: int
    documents: list[EncodedDocument] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    empty: int = 0


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as a worker receives it.

    Attributes:
        backend_json: the `tokenizers` definition, or None for a tokenizer written in Python.
        folder: where `AutoTokenizer` finds it; read by workers only when `backend_json` is None.
        vocab_size: one more than the largest token id.
        eod_id: id of the end-of-document token, or None where the tokenizer has none.
        trust_remote_code: whether code of the folder may run.
    """

    backend_json: str | None
    folder: str
    vocab_size: int
    eod_id: int | None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class EncodingSettings:
    """How documents become tokens: everything that a worker has to know."""

    tokenizer: TokenizerSpec
    json_key: str
    append_eod: bool
    validation_fraction: float


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> TokenizerSpec:
    """Reads a Hugging Face tokenizer folder as Megatron's HuggingFaceTokenizer does, through `AutoTokenizer`. The
    folder's own code runs only with `trust_remote_code`.

    The end of a document is the EOS token, or SEP where there is no EOS: Megatron's own fallback.
    """
    tokenizer = _auto_tokenizer(str(folder), trust_remote_code)
    return TokenizerSpec(
        backend_json=tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None,
        folder=str(folder),
        vocab_size=vocabulary_size(tokenizer),
        eod_id=end_of_document(tokenizer),
        trust_remote_code=trust_remote_code,
    )


def _auto_tokenizer(folder: str, trust_remote_code: bool):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a malformed folder makes it raise
        raise CorpusError(f"cannot load a Hugging Face tokenizer from {folder!r}: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> TokenizerSpec:
    """Trains a byte-level BPE with GPT-2's pre-tokenization, whose decoding gives any text back exactly.

    The end-of-document token is id 0. `save_trained_tokenizer` writes it to `folder`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    # In pieces, for the trainer takes a hundred bytes of memory a character of what it gets at once.
    tokenizer.train_from_iterator((piece for text in texts for piece in pieces_of(text)), trainer)
    return TokenizerSpec(tokenizer.to_str(), str(folder), vocabulary_size(tokenizer), tokenizer.token_to_id(EOS_TOKEN))


def save_trained_tokenizer(spec: TokenizerSpec, folder: Path) -> None:
    """Writes the folder that `--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER` loads."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec.backend_json), eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )
    try:
        tokenizer.save_pretrained(folder)
        make_portable(folder, pads=False)
    except Exception as error:  # the tokenizers library has no class of its own for a full disk
        raise CorpusError(f"cannot write the tokenizer to {str(folder)!r}: {error}") from error


def sample_texts(chunks: Iterable[Chunk], json_key: str, max_bytes: int, bad: BadDocuments) -> list[str]:
    """An unbiased sample of documents of at most `max_bytes`, the same whatever their order.

    Keeps the documents with the smallest hashes, so one pass and `max_bytes` of memory are enough for a corpus of any
    size. The first `max_bytes` would be the first folder of it.
    """
    kept: list[tuple[int, int, str]] = []  # a heap, the largest hash first: (-hash, size, text)
    total = 0
    for text in _beginnings(chunks, json_key, max_bytes, bad):
        data = text.encode()
        heapq.heappush(kept, (-hash64(data), len(data), text))
        total += len(data)
        while total > max_bytes and len(kept) > 1:
            total -= heapq.heappop(kept)[1]
    return [text for _, _, text in sorted(kept)]


def _beginnings(chunks: Iterable[Chunk], json_key: str, longest: int, bad: BadDocuments) -> Iterator[str]:
    """The first `longest` characters of every document, a long one's from its pieces."""
    pieces, length = [], 0
    for chunk in chunks:
        for document in chunk.documents:
            try:
                text = document_text(document, json_key)[: longest - length]
            except BadDocument as error:
                bad.add([str(error)])
                continue
            if document.part is None:
                yield text
                continue
            pieces.append(text)
            length += len(text)
            if document.part.last:
                yield "".join(pieces)
                pieces, length = [], 0


class ChunkEncoder:
    """Turns chunks into tokens; one in each process."""

    def __init__(self, settings: EncodingSettings):
        self.settings = settings
        self.encode_texts = _text_encoder(settings.tokenizer)
        self.dtype = np.min_scalar_type(settings.tokenizer.vocab_size - 1)
        self.tail = [settings.tokenizer.eod_id] if settings.append_eod else []

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        result = EncodedChunk(chunk.disk_bytes)
        texts = []
        for document in chunk.documents:
            try:
                texts.append((document_text(document, self.settings.json_key), document.part))
            except BadDocument as error:
                result.bad.append(str(error))
        pieces = [list(pieces_of(text)) for text, _ in texts]
        encoded = self._encoded(piece for group in pieces for piece in group)
        for (text, part), group in zip(texts, pieces, strict=True):
            tokens = np.concatenate([next(encoded) for _ in group])
            if part is None and not len(tokens):
                result.empty += 1
                continue
            last = part is None or part.last
            if part is None:
                data = text.encode()
                size, place = len(data), hash64(data)
            else:
                size, place = part.text_bytes if last else 0, part.hash64
            # The text decides, not its place: the split outlives a reordering, and no duplicate is on both sides.
            validation = place < self.settings.validation_fraction * 2**64
            tail = np.array(self.tail if last else [], dtype=self.dtype)
            result.documents.append(EncodedDocument(np.concatenate([tokens, tail]), size, validation, last, len(tail)))
        return result

    def _encoded(self, pieces: Iterable[str]) -> Iterator[np.ndarray]:
        """The tokens of every piece. One call of the tokenizer gets pieces of `LONGEST_PIECE` characters together."""
        batch, size = [], 0
        for piece in pieces:
            if batch and size + len(piece) > LONGEST_PIECE:
                yield from self._encoded_batch(batch)
                batch, size = [], 0
            batch.append(piece)
            size += len(piece)
        yield from self._encoded_batch(batch)

    def _encoded_batch(self, batch: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=self.dtype) for ids in self.encode_texts(batch)]


def _text_encoder(spec: TokenizerSpec) -> Callable[[list[str]], list[list[int]]]:
    """What `encode_texts` does, by the `tokenizers` library where the tokenizer is one of its own."""
    if spec.backend_json is None:
        tokenizer = _auto_tokenizer(spec.folder, spec.trust_remote_code)
        return lambda texts: encode_texts(tokenizer, texts)
    backend = Tokenizer.from_str(spec.backend_json)
    backend.no_truncation()  # a tokenizer.json may carry the maximum length of the model it came with
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
