"""A small export in the Hugging Face format, with a tokenizer, for the documents and the examples."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mom_layers.hf import MomConfig, MomForCausalLM

TEXT = "def forward(self, x): the memories of a layer, and the tokens that the router sends to the memories. " * 4


def save_export(folder: Path) -> None:
    """Writes a model of two layers with random weights, and a tokenizer trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = MomConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_heads=2, head_dim=16,
        intermediate_size=64, num_memories=3, topk=2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    MomForCausalLM(config).save_pretrained(folder)
