"""The size of a tokenizer's vocabulary, in the one way in which this project counts."""

from __future__ import annotations


def vocabulary_size(tokenizer) -> int:
    """One more than the largest token id: the rows that an embedding needs.

    ``len(tokenizer)`` counts tokens, which are fewer where the ids have holes.

    Args:
        tokenizer: of transformers or of the tokenizers library.
    """
    ids = {*tokenizer.get_vocab().values(), *getattr(tokenizer, "added_tokens_decoder", {})}
    return max(ids, default=-1) + 1
