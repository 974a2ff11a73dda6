"""How text becomes tokens, in the one way of this project: in a corpus, in prompts, in measurements."""

from __future__ import annotations

from collections.abc import Sequence


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
