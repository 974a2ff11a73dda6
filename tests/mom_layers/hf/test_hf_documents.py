"""Documents packed into rows: nothing crosses a border, in whichever argument borders are described."""

import pytest
import torch
from hf_models import HYBRID, random_tokens, tiny_model
from transformers import DataCollatorWithFlattening

LENGTHS = (9, 1, 17, 2)
DESCRIPTIONS = {
    "position_ids": {},
    "flash attention's arguments": {"return_flash_attn_kwargs": True},
    "numbers of documents": {"return_seq_idx": True},
    "numbers alone": {"return_seq_idx": True, "return_position_ids": False},
}


def documents():
    return [random_tokens(1, length, seed=i) for i, length in enumerate(LENGTHS)]


def alone(model):
    with torch.no_grad():
        return torch.cat([model(document).logits for document in documents()], dim=1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("changes", [{}, HYBRID, {"mom_backend": "gla"}], ids=str)
@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_documents_packed_by_transformers_collator(kind, changes, training):
    model = tiny_model(**changes)
    expected = alone(model)
    batch = DataCollatorWithFlattening(**DESCRIPTIONS[kind])([{"input_ids": d[0].tolist()} for d in documents()])
    batch.pop("labels")
    with torch.no_grad():
        torch.testing.assert_close(model.train(training)(**batch).logits, expected)


@pytest.mark.parametrize("changes", [{}, HYBRID], ids=str)
def test_a_batch_of_several_packed_rows(changes):
    """Two rows of documents, and a row of one document, in one batch with padding at the end of a row."""
    model = tiny_model(**changes).eval()
    a, b, c = random_tokens(1, 5, seed=1), random_tokens(1, 7, seed=2), random_tokens(1, 12, seed=3)
    rows = torch.cat([torch.cat([a, b], 1), torch.cat([b, a], 1), c])
    positions = torch.tensor([[*range(5), *range(7)], [*range(7), *range(5)], [*range(12)]])
    with torch.no_grad():
        alone = [model(x).logits for x in (a, b, c)]
        packed = model(rows, position_ids=positions).logits
        torch.testing.assert_close(packed[0], torch.cat([alone[0], alone[1]], 1)[0])
        torch.testing.assert_close(packed[1], torch.cat([alone[1], alone[0]], 1)[0])
        torch.testing.assert_close(packed[2], alone[2][0])
        mask = torch.ones(3, 12, dtype=torch.long)
        mask[1, 10:] = 0
        padded = model(rows, position_ids=positions, attention_mask=mask).logits
        torch.testing.assert_close(padded[0], packed[0])
        torch.testing.assert_close(padded[1, :10], packed[1, :10])


def test_packed_rows_leave_no_cache():
    model, tokens = tiny_model().eval(), random_tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    assert model(tokens, position_ids=positions).past_key_values is None
    assert model(tokens).past_key_values is not None
    past = model(tokens, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without a cache, got 8 cached tokens"):
        model(tokens, position_ids=positions, past_key_values=past)


def test_positions_of_padding_and_of_generation_are_no_borders():
    model = tiny_model().eval()
    tokens, mask = random_tokens(2, 8), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(model(tokens, attention_mask=mask, position_ids=positions).logits, expected)
        later = model(tokens, position_ids=torch.arange(100, 108)[None]).logits
        torch.testing.assert_close(later, model(tokens).logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"segment_ids": torch.zeros(1, 8)}, "segment_ids is not supported: give packed documents as cu_seqlens"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])}, "attention_mask must hold 0 at padding and 1"),
        ({"cu_seqlens": torch.tensor([0, 5, 3, 8])}, r"never decrease and end at 8, got \[0, 5, 3, 8\]"),
        ({"cu_seqlens": torch.tensor([0, -2, 8])}, r"never decrease and end at 8, got \[0, -2, 8\]"),
        ({"cu_seqlens": torch.tensor([0, 5, 9])}, r"end at 8, got \[0, 5, 9\]"),
        ({"cu_seqlens": torch.tensor([1, 8])}, r"must start at 0, .* got \[1, 8\]"),
        ({"cu_seqlens": torch.tensor([0])}, r"must be \[documents \+ 1\]"),
        ({"cu_seq_lens_q": torch.tensor([0, 8]), "cu_seq_lens_k": torch.tensor([0, 2, 8])}, "the same borders"),
        ({"seq_idx": torch.zeros(1, 7)}, r"seq_idx must be \[1, 8\], got \[1, 7\]"),
        ({"position_ids": torch.zeros(2, 8)}, r"position_ids must be \[1, 8\], got \[2, 8\]"),
    ],
)
def test_wrong_descriptions_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(random_tokens(1, 8), **arguments)
