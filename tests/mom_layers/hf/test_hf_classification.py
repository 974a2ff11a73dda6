"""Sequence classification, and the requests of transformers that a memory cannot honour."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from mom_layers.hf import MomConfig, MomForCausalLM

TINY = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "intermediate_size": 48,
    "vocab_size": 40, "num_memories": 2, "topk": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    MomForCausalLM(MomConfig(**TINY)).save_pretrained(tmp_path)
    return tmp_path


def test_a_language_model_becomes_a_classifier(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    language_model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(1, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    assert torch.equal(model.model.embeddings.weight, language_model.model.embeddings.weight)
    output = model(input_ids=tokens, attention_mask=torch.ones(2, 7), labels=torch.tensor([0, 2]))
    assert output.logits.shape == (2, 3)
    output.loss.backward()
    assert model.score.weight.grad.abs().sum() > 0 and model.model.embeddings.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_class(folder, side):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    tokens = torch.randint(1, 40, (1, 5), generator=torch.Generator().manual_seed(2))
    alone = model(input_ids=tokens).logits
    zeros, ones = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 5)
    parts = [(zeros, zeros), (tokens, ones)] if side == "left" else [(tokens, ones), (zeros, zeros)]
    ids, mask = (torch.cat(pair, dim=1) for pair in zip(*parts, strict=True))
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, alone)
    with pytest.raises(ValueError, match="several sequences need an attention_mask"):
        model(input_ids=ids.repeat(2, 1))


def test_other_implementations_are_refused(folder):
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' is not supported: memories have"):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="flash_attention_2")
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    with pytest.raises(ValueError, match="cache_implementation='static' is not supported: a memory's state"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=2, cache_implementation="static")
