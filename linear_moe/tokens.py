"""How text becomes tokens, in the one way of this project: in a corpus, in prompts, in measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def vocabulary_size(tokenizer) -> int:
    """One more than the largest token id: the rows that an embedding needs.

    ``len(tokenizer)`` counts tokens, which are fewer where the ids have holes.

    Args:
        tokenizer: of transformers or of the tokenizers library.
    """
    ids = {*tokenizer.get_vocab().values(), *getattr(tokenizer, "added_tokens_decoder", {})}
    return max(ids, default=-1) + 1


def end_of_document(tokenizer) -> int | None:
    """Id of the token between two documents of a corpus: EOS, or SEP where there is no EOS, as in Megatron. None where
    the tokenizer has neither."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def document_start(tokenizer) -> list[int]:
    """The tokens before the first token of a document in training: the one that ended the document before. Empty where
    the tokenizer has no end-of-document token."""
    end = end_of_document(tokenizer)
    return [] if end is None else [end]


def encode_texts(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of every text alone, without a BOS or SEP that the tokenizer would add: a corpus has none.

    A special token that the text spells out becomes that token, as everywhere with Hugging Face tokenizers.
    """
    return tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids if texts else []


def make_portable(folder: Path, *, pads: bool) -> None:
    """Changes a tokenizer's folder so that transformers 4.57 and 5 load it.

    transformers 5 writes names that 4.57 does not have: the class TokenizersBackend, and a list of special tokens.

    Args:
        pads: whether batches are padded, as with an export. A tokenizer without a padding token then pads with its
            end-of-sequence token, which a batch's mask tells apart. Without padding, as in Megatron's training, a
            padding token that is the end-of-sequence token is removed: Megatron would leave that token out of the loss.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        return
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        for name in ("backend", "is_local"):
            settings.pop(name, None)
    if settings.get("tokenizer_class") == "PreTrainedTokenizerFast":
        # As in transformers 5: the class of 4.57 adds token_type_ids, which no model here takes.
        settings.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    pad, end = settings.get("pad_token"), settings.get("eos_token")
    if pads and pad is None and end is not None:
        settings["pad_token"] = end
    if pads:
        settings.setdefault("padding_side", "left")  # a text is continued at its right end
    elif not pads and pad == end:
        settings.pop("pad_token", None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
