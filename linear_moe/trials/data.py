"""A small indexed data set and a tokenizer for trials. Megatron's own class writes the data set.

python -m linear_moe.trials.data PREFIX
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

VOCABULARY = 127
DOCUMENTS = 600
SPECIAL = ("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<|endoftext|>")
USUAL = 0.9
"""How often a token is the one that follows from the token before it: a model learns that within a few steps."""


def write(prefix: Path) -> None:
    """Writes PREFIX.bin and PREFIX.idx."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(VOCABULARY))
    for length in random.integers(32, 128, DOCUMENTS):
        tokens = [int(random.integers(VOCABULARY))]
        while len(tokens) < length:
            follows = (3 * tokens[-1] + 1) % VOCABULARY
            tokens.append(follows if random.random() < USUAL else int(random.integers(VOCABULARY)))
        builder.add_document(np.array(tokens), [len(tokens)])
    builder.finalize(f"{prefix}.idx")


def write_tokenizer(folder: Path) -> None:
    """Writes a tokenizer of `VOCABULARY` words, with those of fill-in-the-middle, in Hugging Face's format."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"word{number}" for number in range(VOCABULARY - len(SPECIAL))] + list(SPECIAL)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[-1], unk_token=words[0])
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[:-1])})
    fast.save_pretrained(folder)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    write_tokenizer(Path(sys.argv[1]).with_name("tokenizer"))
