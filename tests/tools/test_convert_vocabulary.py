"""A tokenizer whose ids have holes: the export has a row for every id, and the check covers every row."""

import json
from argparse import Namespace

import pytest
import torch
from test_convert_names import TINY, read_weights

from linear_moe.commands import convert_from_hf, convert_to_hf, generate
from linear_moe.conversion.checkpoint import write_checkpoint
from linear_moe.conversion.config import arguments_from_config, layout_of
from linear_moe.conversion.files import ConversionError, load_tokenizer
from linear_moe.conversion.verify import check_vocabulary, draw_tokens
from linear_moe.corpus.tokenizer import save_trained_tokenizer, train_tokenizer
from linear_moe.tokens import vocabulary_size
from mom_layers.hf import MomConfig

ROWS, LARGEST = 640, 620


@pytest.fixture(scope="module")
def holes(tmp_path_factory, stories):
    """A tokenizer of 400 tokens whose last one has the id 620."""
    folder = tmp_path_factory.mktemp("holes")
    save_trained_tokenizer(train_tokenizer(stories, 400, folder), folder)
    definition = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = LARGEST
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    return folder


@pytest.fixture(scope="module")
def checkpoint(holes, tmp_path_factory):
    """What training with this tokenizer leaves: 640 rows, none of them said to be padding."""
    folder = tmp_path_factory.mktemp("checkpoint")
    config = MomConfig(**(TINY | {"vocab_size": ROWS}))
    args = vars(arguments_from_config(config)) | {
        "padded_vocab_size": ROWS, "tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(holes),
    }  # fmt: skip
    del args["hf_config"]
    torch.manual_seed(0)
    write_checkpoint(
        folder, layout_of(config), lambda _: torch.float32, lambda e: torch.randn(e.shape) * 0.1, Namespace(**args)
    )
    return folder


def test_export_keeps_every_row_that_an_id_reaches(checkpoint, holes, tmp_path, capsys):
    assert len(load_tokenizer(holes)) == 400 < vocabulary_size(load_tokenizer(holes)) == LARGEST + 1
    export = tmp_path / "export"
    command = ["--load", str(checkpoint), "--save", str(export), "--verify", "--verify-tokens", "16"]
    assert convert_to_hf.main(command) == 0
    assert json.loads((export / "config.json").read_text())["vocab_size"] == LARGEST + 1
    weights = read_weights(export)
    assert len(weights["model.embeddings.weight"]) == len(weights["lm_head.weight"]) == LARGEST + 1

    word = next(word for word, id in load_tokenizer(holes).get_vocab().items() if id == LARGEST)
    text = load_tokenizer(holes).convert_tokens_to_string([word])
    assert load_tokenizer(holes)(text).input_ids == [LARGEST]
    assert generate.main(["--load", str(export), "--prompt", text, "--max-new-tokens", "2"]) == 0
    assert convert_from_hf.main(["--load", str(export), "--save", str(tmp_path / "back")]) == 0
    capsys.readouterr()


def test_verification_covers_the_whole_vocabulary(holes):
    tokens = draw_tokens(LARGEST + 1, 64)
    assert tokens.max() == LARGEST and tokens.min() < 20 and len(tokens.unique()) > 80
    check_vocabulary(LARGEST + 1, load_tokenizer(holes))
    with pytest.raises(ConversionError, match="has 620 rows of the vocabulary, and its tokenizer needs 621"):
        check_vocabulary(LARGEST, load_tokenizer(holes))


def test_an_embedding_without_the_last_row_is_refused(holes, checkpoint, tmp_path, capsys):
    folder = tmp_path / "checkpoint"
    config = MomConfig(**(TINY | {"vocab_size": LARGEST}))
    args = arguments_from_config(config)
    del args.hf_config
    folder.mkdir()
    write_checkpoint(folder, layout_of(config), lambda _: torch.float32, lambda e: torch.zeros(e.shape), args)
    command = ["--load", str(folder), "--save", str(tmp_path / "export"), "--tokenizer", str(holes)]
    assert convert_to_hf.main(command) == 1
    assert "the tokenizer needs 621 rows, one more than its largest id" in capsys.readouterr().err
