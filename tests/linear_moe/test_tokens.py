"""A vocabulary is one more than the largest token id, in the corpus's facts and before training."""

import json
import re

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from pretraining_runs import MOM, TINY, pretrain
from tokenizers import Tokenizer, models, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from linear_moe.commands import preprocess_data
from linear_moe.corpus.tokenizer import load_tokenizer, save_trained_tokenizer, train_tokenizer
from linear_moe.tokens import encode_texts, end_of_document, vocabulary_size


@pytest.fixture(scope="module")
def holes(tmp_path_factory):
    """A tokenizer of 300 tokens whose last one has the id 620."""
    folder = tmp_path_factory.mktemp("holes")
    texts = ["memory of a sequence is a matrix " * 9, "router"] * 9
    save_trained_tokenizer(train_tokenizer(texts, 300, folder), folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 620
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


def test_vocabulary_size(holes):
    tokenizer = AutoTokenizer.from_pretrained(holes)
    assert len(tokenizer) < 300 < vocabulary_size(tokenizer) == 621
    tokenizer.add_tokens(["<one more>"])
    assert vocabulary_size(tokenizer) == max(tokenizer.convert_tokens_to_ids(["<one more>"])[0], 620) + 1
    assert vocabulary_size(Tokenizer.from_file(str(holes / "tokenizer.json"))) == 621
    assert vocabulary_size(Tokenizer(models.BPE())) == 0
    slow = ByT5Tokenizer()
    assert vocabulary_size(slow) == len(slow) == max(slow.get_vocab().values()) + 1


@pytest.fixture(scope="module")
def with_bos(holes, tmp_path_factory):
    """The tokenizer with a template that puts a token before and after every text, as Mistral's and BERT's do."""
    folder = tmp_path_factory.mktemp("bos")
    backend = Tokenizer.from_file(str(holes / "tokenizer.json"))
    backend.add_special_tokens(["<s>", "</s>"])
    ids = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", sep_token="</s>").save_pretrained(folder)
    return folder


def test_text_becomes_tokens_in_one_way(with_bos, tmp_path):
    """A corpus holds the tokens of the text alone, and then the end of the document."""
    texts = ["memory of a sequence", "router", "  is a matrix\n"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", tmp_path / "text.jsonl", "--output", tmp_path / "data", "--tokenizer", with_bos, "--workers", 1]
    assert preprocess_data.main(list(map(str, words))) == 0
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    expected = encode_texts(tokenizer, texts)
    assert end_of_document(tokenizer) == tokenizer.sep_token_id  # it has no EOS
    data = IndexedDataset(str(tmp_path / "data"))
    assert [list(tokens) for tokens in data] == [ids + [end_of_document(tokenizer)] for ids in expected]
    assert tokenizer(texts).input_ids == [[tokenizer.bos_token_id, *ids, tokenizer.sep_token_id] for ids in expected]
    assert encode_texts(tokenizer, []) == []


def test_facts_of_a_corpus(holes, tmp_path):
    (tmp_path / "text.txt").write_text("memory of a sequence")
    words = ["--input", tmp_path / "text.txt", "--output", tmp_path / "data", "--tokenizer", holes, "--workers", 1]
    assert preprocess_data.main(list(map(str, words))) == 0
    assert json.loads((tmp_path / "data.json").read_text())["vocab_size"] == load_tokenizer(holes).vocab_size == 621


def test_training_compares_ids_with_rows(holes):
    words = [word for word in TINY if word not in ("--vocab-size", "127")]
    words[words.index("NullTokenizer")] = "HuggingFaceTokenizer"
    words += [*MOM, "--mock-data", "--train-iters", "1", "--tokenizer-model", holes]
    run = pretrain(*words)
    assert run.returncode == 1
    assert re.search(r"^error: the largest token id of \S+ is 620, and the embedding has 3\d\d rows: give "
                     r"--padded-vocab-size 640", run.stdout, re.M), run.stdout[-2000:]  # fmt: skip
    run = pretrain(*words, "--padded-vocab-size", "640")
    assert run.returncode == 0, run.stdout[-2000:]
