"""Numbers and data that cannot work are refused by name, before the first step."""

from types import SimpleNamespace

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from pretraining_runs import MOM, TINY, losses, pretrain

from linear_moe.entry import run_checks


def arguments(**values) -> SimpleNamespace:
    settings = dict.fromkeys(
        (*run_checks.AT_LEAST_ONE, *run_checks.NOT_NEGATIVE, *run_checks.AT_MOST, "save", "load", "split", "eval_iters")
    )
    return SimpleNamespace(**settings | {"lr": 1e-3, "min_lr": 0.0, "train_iters": 10} | values)


def test_good_numbers_pass():
    run_checks.check_values(arguments())
    run_checks.check_values(arguments(eval_iters=-1))  # in public scripts: no validation, as with 0
    run_checks.check_values(
        arguments(save="c", save_interval=5, lr_warmup_iters=9, lr_warmup_fraction=0.5, eval_iters=0)
    )


@pytest.mark.parametrize("name", run_checks.AT_LEAST_ONE)
@pytest.mark.parametrize("value", [0, -1])
def test_numbers_below_one_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{run_checks.option(name)} {value}: use a whole number of at least 1"):
        run_checks.check_values(arguments(**{name: value}))


@pytest.mark.parametrize("name", run_checks.NOT_NEGATIVE)
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_negative_numbers_are_refused(name, value):
    with pytest.raises(ValueError, match=f"^{run_checks.option(name)} {value}: use a number that is not negative"):
        run_checks.check_values(arguments(**{name: value}))


@pytest.mark.parametrize("name", run_checks.AT_MOST)
def test_numbers_that_are_slips_of_the_pen_are_refused(name):
    most = run_checks.AT_MOST[name]
    with pytest.raises(
        ValueError, match=f"^{run_checks.option(name)} {most + 1}: use a whole number of at most {most}"
    ):
        run_checks.check_values(arguments(**{name: most + 1}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"save": ""}, "--save '': give a folder"),
        ({"load": ""}, "--load '': give a folder"),
        ({"load": __file__}, f"--load {__file__}: not a folder"),
        ({"split": "0,0"}, "--split 0,0: all shares are zero"),
        ({"layernorm_epsilon": 1.0}, "--norm-epsilon 1.0: use a number from 0 up to, but not including, 1"),
        ({"save": "c"}, "--save c needs --save-interval"),
        ({"min_lr": 0.1}, "--min-lr 0.1 is larger than --lr 0.001"),
        (
            {"eval_iters": 8, "eval_interval": None},
            r"--eval-iters 8 needs --eval-interval, the number of steps between",
        ),
        ({"eval_iters": -2}, r"--eval-iters -2: use a number of steps, or 0 \(or -1\) for no validation"),
        ({"lr_warmup_fraction": 1.0}, "--lr-warmup-fraction 1.0: use a share of the steps below 1"),
        ({"lr_warmup_iters": 10}, "--lr-warmup-iters 10: use fewer steps than --train-iters 10"),
        ({"lr_warmup_iters": 9, "lr_decay_iters": 5}, "--lr-warmup-iters 9: use fewer steps than --lr-decay-iters 5"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        run_checks.check_values(arguments(**values))


def write_data(prefix, highest, documents=50):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(40_000))
    rng = np.random.default_rng(0)
    for _ in range(documents):
        builder.add_document(rng.integers(0, highest, 100), [100])
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_the_range_of_a_large_file_comes_from_parts_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr(run_checks, "SAMPLE_TOKENS", 640)
    tokens = np.full(100_000, 5, np.uint16)
    tokens[0], tokens[-1] = 2, 900
    (tmp_path / "tokens.bin").write_bytes(tokens.tobytes())
    assert run_checks.token_range(tmp_path / "tokens.bin", np.dtype(np.uint16)) == (2, 900)


def refused(*words) -> str:
    run = pretrain(*TINY, *MOM, "--train-iters", 4, *words)
    assert run.returncode == 1 and "Traceback" not in run.stdout and not losses(run), run.stdout[-3000:]
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(("option", "value"), [("--eval-interval", 0), ("--seq-length", 0), ("--log-interval", 0)])
def test_a_run_is_refused_by_option_and_value(option, value):
    assert refused("--mock-data", option, value).startswith(
        f"error: {option} {value}: use a whole number of at least 1"
    )


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    data = write_data(tmp_path / "data", 300)
    line = refused("--data-path", data, "--split", "90,5,5")
    assert line.startswith(f"error: {data}.bin holds token 299, and the model's vocabulary has 128 rows: ")
    assert "another tokenizer than --vocab-size 127" in line


def test_data_without_a_sequence_or_a_document_are_refused(tmp_path):
    good, short = write_data(tmp_path / "good", 120), write_data(tmp_path / "short", 120, documents=1)
    long = ["--seq-length", 512, "--max-position-embeddings", 512]
    line = refused("--train-data-path", good, "--valid-data-path", short, "--full-validation", *long)
    assert line.startswith(f"error: the valid data ({short}) hold no sequence of --seq-length 512 tokens")
    line = refused("--data-path", short, *long)  # one document cannot be split
    assert line.startswith(f"error: the valid data ({short}) hold no token: --split leaves no document for them")


def test_validation_data_without_a_sequence_are_no_error_where_none_is_read(tmp_path):
    """Neither a file nor a split: --eval-iters 0 and -1 leave validation and test data out."""
    good, short = write_data(tmp_path / "good", 120), write_data(tmp_path / "short", 120, documents=1)
    long = ["--seq-length", 512, "--max-position-embeddings", 512]
    files = ["--train-data-path", good, "--valid-data-path", short, "--test-data-path", short]
    for data, steps in ((files, 0), (["--data-path", short, "--split", "98,1,1"], -1)):
        run = pretrain(*TINY, *MOM, *long, "--train-iters", 2, *data, "--eval-iters", steps)
        assert run.returncode == 0, run.stdout[-3000:]
        assert len(losses(run)) == 2
