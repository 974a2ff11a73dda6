"""A run that starts from a checkpoint has the checkpoint's rows of the vocabulary, at any tensor-parallel size."""

import logging
from argparse import Namespace

import pytest
from pretraining_runs import MOM, TINY, losses, pretrain

from linear_moe.entry.vocabulary_rows import keep_rows, report_rows

RUN = [*TINY, *MOM, "--mock-data", "--no-load-optim", "--override-opt_param-scheduler"]
RUN += ["--vocab-size", "600", "--make-vocab-size-divisible-by", "128"]
TWO = ["--tensor-model-parallel-size", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """600 tokens in 640 rows, after enough steps for the padding to have learned that padding never follows."""
    folder = tmp_path_factory.mktemp("rows") / "checkpoint"
    run = pretrain(*RUN, "--train-iters", "10", "--save", folder, "--save-interval", "10")
    assert run.returncode == 0, run.stdout[-3000:]
    return folder


def resume(checkpoint, *options, processes=1):
    """The step after the checkpoint."""
    run = pretrain(*RUN, "--train-iters", "11", "--load", checkpoint, *options, processes=processes)
    assert run.returncode == 0, run.stdout[-3000:]
    return float(losses(run)[11]), run.stdout


@pytest.fixture(scope="module")
def expected(checkpoint):
    return resume(checkpoint)[0]


@pytest.mark.parametrize("options", [[], ["--use-checkpoint-args"]])
def test_two_tensor_parallel_ranks_keep_the_rows(checkpoint, expected, options):
    loss, log = resume(checkpoint, *TWO, *options, processes=2)
    assert loss == pytest.approx(expected, abs=2e-4)
    assert "rows in the checkpoint" not in log


def test_another_multiple_keeps_the_rows(checkpoint, expected):
    assert resume(checkpoint, "--make-vocab-size-divisible-by", "512")[0] == expected


def test_other_rows_are_announced(checkpoint, expected):
    loss, log = resume(checkpoint, "--padded-vocab-size", "768")
    assert "the embedding has 640 rows in the checkpoint and 768 in this run: rows 640 to 767 are new and random" in log
    assert abs(loss - expected) > 1e-3


def arguments(**changed) -> Namespace:
    held = {"padded_vocab_size": None, "pad_vocab_size": True, "tokenizer_type": "HuggingFaceTokenizer",
            "vocab_size": None, "tensor_model_parallel_size": 1}  # fmt: skip
    return Namespace(**(held | changed))


@pytest.mark.parametrize(
    ("changed", "rows", "kept"),
    [
        ({}, 640, 640),
        ({"tensor_model_parallel_size": 2}, 640, 640),
        ({"tensor_model_parallel_size": 3}, 640, 642),
        ({"tensor_model_parallel_size": 2, "padded_vocab_size": 601}, 601, 602),  # as --use-checkpoint-args leaves it
        ({"padded_vocab_size": 768}, 640, 768),
        ({"pad_vocab_size": False}, 640, None),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 641}, 640, None),
        ({"tokenizer_type": "NullTokenizer", "vocab_size": 640}, 640, 640),
        ({}, None, None),
    ],
)
def test_which_rows_a_run_has(changed, rows, kept):
    args = arguments(**changed)
    keep_rows(args, Namespace(padded_vocab_size=rows))
    assert args.padded_vocab_size == kept
    other = arguments(**changed)
    keep_rows(other, Namespace())
    assert other == arguments(**changed)


@pytest.mark.parametrize(
    ("here", "there", "words"),
    [(642, 640, "rows 640 to 641 are new and random"), (640, 768, "rows 640 to 767 are left out"), (640, 640, None),
     (None, 640, None), (640, None, None)],
)  # fmt: skip
def test_what_is_said_of_other_rows(here, there, words, caplog):
    with caplog.at_level(logging.WARNING):
        report_rows(arguments(padded_vocab_size=here), Namespace(padded_vocab_size=there))
    assert words in caplog.text if words else not caplog.text
