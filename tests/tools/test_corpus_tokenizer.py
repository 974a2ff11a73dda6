"""Tokenizing by itself: long texts, unusual tokenizers, the sample that a tokenizer is trained on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import ByT5Tokenizer

from linear_moe.corpus.files import BadDocuments, Chunk, Document
from linear_moe.corpus.tokenizer import ChunkEncoder, EncodingSettings, load_tokenizer, pieces_of, sample_texts


def chunk_of(*texts: str) -> Chunk:
    return Chunk([Document(f"{i}.txt", 0, text.encode()) for i, text in enumerate(texts)])


def encode(folder: Path, *texts: str) -> list[list[int]]:
    encoder = ChunkEncoder(EncodingSettings(load_tokenizer(folder), "text", True, 0.0))
    return [document.tokens.tolist() for document in encoder(chunk_of(*texts)).documents]


# The digits and newlines of GPT-4's pattern, which Llama 3 and Qwen share but for details.
GPT4_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize("pattern", ["gpt2", GPT4_PATTERN])
@pytest.mark.parametrize("longest", [100, 1000])
def test_pieces_have_the_tokens_of_the_whole(tokenizer_folder, monkeypatch, pattern, longest):
    spec = load_tokenizer(tokenizer_folder)
    if pattern == GPT4_PATTERN:
        backend = Tokenizer.from_str(spec.backend_json)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        spec = replace(spec, backend_json=backend.to_str())
    encoder = ChunkEncoder(EncodingSettings(spec, "text", True, 0.0))
    text = "".join(
        f"def f{i}(x):\n    return x +\\\n{i}.\n\n\n# {i}:\n#  note\r\n \nend\n" + "\n" * (i % 3) for i in range(500)
    )
    whole = encoder(chunk_of(text, "next")).documents
    monkeypatch.setattr(pieces_of, "__defaults__", (longest,))
    assert len(list(pieces_of(text))) > len(text) // longest
    cut = encoder(chunk_of(text, "next")).documents
    assert [document.tokens.tolist() for document in cut] == [document.tokens.tolist() for document in whole]


@pytest.mark.parametrize("text", ["", "x" * 250, "\n" * 250, " \n" * 125, "x" * 99 + "\n" + "y" * 150])
def test_pieces_lose_nothing(text):
    pieces = list(pieces_of(text, 100))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 100


def test_maximum_length_of_the_tokenizer_is_ignored(tmp_path, tokenizer_folder):
    definition = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    definition["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "!",
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_bytes((tokenizer_folder / "tokenizer_config.json").read_bytes())
    texts = ["short", "long " * 50]
    assert encode(tmp_path, *texts) == encode(tokenizer_folder, *texts)


def test_tokenizer_written_in_python(tmp_path):
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).backend_json is None
    assert encode(tmp_path, "memory", "of Zürich") == [tokenizer("memory").input_ids, tokenizer("of Zürich").input_ids]


def test_sample_is_bounded_and_does_not_depend_on_the_order():
    texts = [f"document {i} " * (i % 7 + 1) for i in range(200)]
    forwards = sample_texts([chunk_of(*texts)], "text", 1000, BadDocuments(0))
    backwards = sample_texts([chunk_of(*texts[:99:-1]), chunk_of(*texts[99::-1])], "text", 1000, BadDocuments(0))
    assert forwards == backwards
    assert 800 < sum(map(len, forwards)) <= 1000
    assert len({int(text.split()[1]) // 50 for text in forwards}) == 4  # from each quarter
    assert sample_texts([chunk_of("x" * 5000)], "text", 1000, BadDocuments(0)) == ["x" * 1000]


def test_a_trained_tokenizer_loads_in_transformers_4_and_5(tokenizer_folder, tmp_path):
    """transformers 4.57 has no class TokenizersBackend, and takes special tokens as a list of another name."""
    from linear_moe.conversion.files import copy_tokenizer, load_tokenizer

    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings.get("pad_token") is None
    copy_tokenizer(tokenizer_folder, tmp_path / "export", pads=True)
    tokenizer = load_tokenizer(tmp_path / "export")
    assert tokenizer.pad_token == tokenizer.eos_token and tokenizer.padding_side == "left"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert len(set(map(len, batch.input_ids))) == 1 and 0 in batch.attention_mask[0]
    # Megatron leaves a padding token out of the loss.
    copy_tokenizer(tmp_path / "export", tmp_path / "megatron", pads=False)
    assert load_tokenizer(tmp_path / "megatron").pad_token is None


def test_a_card_names_license_language_and_data():
    from linear_moe.conversion.card import CardFacts

    facts = CardFacts("me/mom", "apache-2.0", ["en", "de"], ["me/texts"])
    assert facts.front_matter() == ('license: "apache-2.0"\nlanguage:\n- "en"\n- "de"\ndatasets:\n- "me/texts"\n')
