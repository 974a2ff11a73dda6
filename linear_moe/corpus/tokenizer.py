"""From text to token ids: Hugging Face tokenizers loaded or trained, and the work of one tokenizing process.

`transformers` is imported late: it brings torch along, half a gigabyte in every worker, and a worker needs only the
`tokenizers` library underneath.
"""

import hashlib
import heapq
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from linear_moe.corpus.files import BadDocument, BadDocuments, Chunk, CorpusError, document_text

EOS_TOKEN = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte and the end-of-document token
LONGEST_PIECE = 1 << 20  # characters; a whole book in one call takes 250 bytes of memory a character


class EncodedDocument(NamedTuple):
    """Token ids of one document, the size of its text in UTF-8, and whether it belongs to the validation set."""

    tokens: np.ndarray
    text_bytes: int
    validation: bool


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
    """

    backend_json: str | None
    folder: str
    vocab_size: int
    eod_id: int | None


@dataclass(frozen=True)
class EncodingSettings:
    """How documents become tokens: everything that a worker has to know."""

    tokenizer: TokenizerSpec
    json_key: str
    append_eod: bool
    validation_fraction: float


def load_tokenizer(folder: Path) -> TokenizerSpec:
    """Reads a Hugging Face tokenizer folder as Megatron's HuggingFaceTokenizer does, through `AutoTokenizer`.

    The end of a document is the EOS token, or SEP where there is no EOS: Megatron's own fallback.
    """
    tokenizer = _auto_tokenizer(str(folder))
    eod_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    return TokenizerSpec(
        backend_json=tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None,
        folder=str(folder),
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        eod_id=eod_id,
    )


def _auto_tokenizer(folder: str):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
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
    tokenizer.train_from_iterator(texts, trainer)
    return TokenizerSpec(tokenizer.to_str(), str(folder), tokenizer.get_vocab_size(), tokenizer.token_to_id(EOS_TOKEN))


def save_trained_tokenizer(spec: TokenizerSpec, folder: Path) -> None:
    """Writes the folder that `--tokenizer-type HuggingFaceTokenizer --tokenizer-model FOLDER` loads."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec.backend_json), eos_token=EOS_TOKEN, clean_up_tokenization_spaces=False
    )
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:  # the tokenizers library has no class of its own for a full disk
        raise CorpusError(f"cannot write the tokenizer to {str(folder)!r}: {error}") from error


def sample_texts(chunks: Iterable[Chunk], json_key: str, max_bytes: int, bad: BadDocuments) -> list[str]:
    """An unbiased sample of documents of at most `max_bytes`, the same whatever their order.

    Keeps the documents with the smallest hashes, so one pass and `max_bytes` of memory are enough for a corpus of any
    size. The first `max_bytes` would be the first folder of it.
    """
    kept: list[tuple[int, int, str]] = []  # a heap, the largest hash first: (-hash, size, text)
    total = 0
    for chunk in chunks:
        for document in chunk.documents:
            try:
                text = document_text(document, json_key)[:max_bytes]
            except BadDocument as error:
                bad.add([str(error)])
                continue
            data = text.encode()
            heapq.heappush(kept, (-_hash64(data), len(data), text))
            total += len(data)
            while total > max_bytes and len(kept) > 1:
                total -= heapq.heappop(kept)[1]
    return [text for _, _, text in sorted(kept)]


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


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
                texts.append(document_text(document, self.settings.json_key))
            except BadDocument as error:
                result.bad.append(str(error))
        pieces = [list(pieces_of(text)) for text in texts]
        encoded = iter(self.encode_texts([piece for group in pieces for piece in group]))
        for text, group in zip(texts, pieces, strict=True):
            ids = [token for _ in group for token in next(encoded)]
            if not ids:
                result.empty += 1
                continue
            data = text.encode()
            # The text decides, not its place: the split outlives a reordering, and no duplicate is on both sides.
            validation = _hash64(data) < self.settings.validation_fraction * 2**64
            result.documents.append(EncodedDocument(np.array(ids + self.tail, dtype=self.dtype), len(data), validation))
        return result


def pieces_of(text: str, longest: int = LONGEST_PIECE) -> Iterator[str]:
    """Cuts a long text between two lines, at a newline with visible characters on both sides.

    There the pre-tokenizers of byte-level BPE cut as well, so the tokens are those of the whole text. (Blank lines and
    indentation are no such place: how whitespace is grouped depends on what follows.) A text without one within
    `longest` characters is cut there, at the cost of one token boundary.
    """
    start = 0
    while len(text) - start > longest:
        cut = text.rfind("\n", start + 1, start + longest)
        while cut > 0 and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind("\n", start + 1, cut)
        end = cut + 1 if cut > 0 else start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def _text_encoder(spec: TokenizerSpec) -> Callable[[list[str]], list[list[int]]]:
    """Encodes without adding special tokens, since a BOS or SEP would double the end-of-document token.

    A special token that the text spells out becomes that token, as everywhere with Hugging Face tokenizers.
    """
    if spec.backend_json is None:
        tokenizer = _auto_tokenizer(spec.folder)
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else []
    backend = Tokenizer.from_str(spec.backend_json)
    backend.no_truncation()  # a tokenizer.json may carry the maximum length of the model it came with
    backend.no_padding()
    return lambda texts: [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
