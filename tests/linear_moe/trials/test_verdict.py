"""What the output of a run says."""

import pytest

from linear_moe.trials.table import Rows, exceptions, groups, markdown, summary
from linear_moe.trials.verdict import FAILS, REFUSED, STOPS, TRAINS, compare, judge, last_error


def output(losses, norms=None):
    """The lines that Megatron prints for training steps."""
    norms = norms or [1.0] * len(losses)
    return "\n".join(
        f" [2026-01-01 00:00:00] iteration {number:8d}/{len(losses):8d} | consumed samples: 8 | lm loss: {loss:.6E} | "
        f"loss scale: 1.0 | grad norm: {norm:.3f} | num zeros: 1.0 |"
        for number, (loss, norm) in enumerate(zip(losses, norms, strict=True), 1)
    )


INJECTED = output([4.8]) + "\nWARNING:megatron.core.rerun_state_machine:Injecting error type Transient error\n"


@pytest.mark.parametrize(
    ("status", "text", "result", "reason"),
    [
        (0, output([4.8, 4.5, 4.0]), TRAINS, "loss 4.800 to 4.000"),
        (0, output([4.8, 4.8, 4.79]), FAILS, "the loss does not move"),
        (0, output([4.8, 4.5, 4.0], [1.5, 0.01, 0.01]), FAILS, "the gradient norm collapses: 1.5 at the first step"),
        (0, output([4.8, 4.5, float("nan")]), FAILS, "losses"),
        (0, output([4.8, 4.5]), FAILS, "2 of 3 steps"),
        (None, output([4.8]), FAILS, "no end within the time limit"),
        (1, "Traceback\nValueError: --lr -1: use a number\n", REFUSED, "ValueError: --lr -1: use a number"),
        (2, "pretrain_gpt.py: error: unrecognized arguments: --x\n", REFUSED, "unrecognized arguments: --x"),
        (1, output([4.8]) + "\nValueError: too late\n", FAILS, "ValueError: too late"),
        (1, "KeyError: 'x'\n", FAILS, "KeyError: 'x'"),
        (1, "RuntimeError: invalid tensor size\n", FAILS, "RuntimeError: invalid tensor size"),
        (1, "RuntimeError: --token-mixer mom: no layer\n", REFUSED, "no layer"),
        (16, "the end\n", FAILS, "exit status 16 without an error"),
        (16, INJECTED + "First rerun: unexpected result is reproducible\n", STOPS, "exit status 16: Megatron's rerun"),
        (17, 2 * (INJECTED + "Rank 0: Possible transient error!!\n"), STOPS, "found its injected transient error"),
        (17, "Rank 0: Possible transient error!!\n", FAILS, "exit status 17 without an error"),
        (1, INJECTED + "Rank 0: Possible transient error!!\n", FAILS, "exit status 1 without an error"),
    ],
)
def test_verdict_on_an_output(status, text, result, reason):
    verdict = judge(status, text, steps=3)
    assert verdict.result == result
    assert reason in verdict.reason


def test_the_line_that_tells_why_is_not_that_of_another_process():
    text = "RuntimeError: the reason\ntorch.distributed.DistBackendError: gloo: Connection closed by peer\n"
    assert last_error(text) == "RuntimeError: the reason"


def test_a_resumed_run_prints_the_same_digits():
    whole = output([4.8, 4.6, 4.4, 4.2, 4.0, 3.8])
    later = whole.splitlines()[3:]
    assert compare(whole, "\n".join(later), saved=3) == ""
    mean = later[1].replace("4.000000", "4.100000")  # of two steps, as Megatron prints it
    assert compare(whole, "\n".join([later[0], mean, later[2]]), saved=3) == ""
    other = later[2].replace("3.800000", "3.800001")
    assert "step 6" in compare(whole, "\n".join([*later[:2], other]), saved=3)
    assert "step 5: " in compare(whole, "\n".join([later[0], later[1].replace("norm: 1.000", "norm: 1.001")]), saved=3)
    assert "step 6 is missing" in compare(whole, "\n".join(later[:2]), saved=3)
    validation = "\nvalidation loss at iteration 6 on validation set | lm loss value: {}E+00 |"
    assert "validation" in compare(whole + validation.format(4.1), "\n".join(later) + validation.format(4.2), saved=3)


def test_rows_are_kept_and_tabled(tmp_path):
    rows = Rows(tmp_path / "rows.csv")
    for run, result, reason in [("mom", FAILS, "a | b"), ("softmax", TRAINS, "")]:
        rows.add(set="tests/a", run=run, processes="2", result=result, reason=reason, seconds="1.0")
    rows.add(set="tests/b", run="mom", processes="2", result=TRAINS, reason="", seconds="1.0")
    rows.add(set="tests/b", run="resumed", processes="2", result=TRAINS, reason="exact", seconds="1.0")
    again = Rows(tmp_path / "rows.csv")
    assert again.rows == rows.rows
    text = markdown(again, ["tests/a", "tests/b", "tests/c"])
    assert "| tests/a | trains | fails |  | a \\| b |" in text
    assert "| tests/b |  | trains | exact |  |" in text
    assert "tests/c" not in text
    assert summary(again, ["tests/a", "tests/b"]).endswith("; 1 train with softmax and not with memories.")
    again.forget([FAILS])
    assert again.result("tests/a", "mom") is None
    assert Rows(tmp_path / "rows.csv").result("tests/b", "resumed") == TRAINS


@pytest.fixture
def rows(tmp_path):
    """Rows of five sets: two that are refused alike, a run that stops, a resumption that differs, and one to be run."""
    rows = Rows(tmp_path / "rows.csv")
    for name, results in {
        "tests/gpt/a": {"mom": REFUSED, "softmax": TRAINS},
        "tests/gpt/b": {"mom": REFUSED, "softmax": TRAINS},
        "tests/moe/c": {"mom": STOPS, "softmax": STOPS},
        "public/d": {"mom": TRAINS, "softmax": TRAINS, "resumed": FAILS, "softmax resumed": FAILS},
        "public/e": {"mom": TRAINS, "softmax": REFUSED, "resumed": TRAINS},
    }.items():
        for run, result in results.items():
            rows.add(set=name, run=run, processes="2", result=result, reason=f"why {result}", seconds="1.0")
    return rows


NAMES = ("tests/gpt/a", "tests/gpt/b", "tests/moe/c", "public/d", "public/e", "public/f")


def test_exceptions_have_a_line_for_each_reason(rows):
    assert exceptions(rows, NAMES).splitlines()[2:] == [
        "| tests/gpt/a and 1 more | trains | refused |  | why refused |",
        "| tests/moe/c | stops as told | stops as told |  | why stops as told |",
        "| public/d | trains | trains | differs, as with softmax | resumed: why fails |",
    ]


def test_sets_are_counted_by_where_they_come_from(rows):
    assert groups(rows, NAMES).splitlines()[2:] == [
        "| tests/gpt | 2 | 2 | 0 | 0 | 0 | 2 | 0 | 2 |",
        "| tests/moe | 1 | 1 | 0 | 0 | 1 | 0 | 0 | 0 |",
        "| public | 3 | 2 | 2 | 1 | 0 | 0 | 0 | 0 |",
        "| all | 6 | 5 | 2 | 1 | 1 | 2 | 0 | 2 |",
    ]


def test_sets_with_the_same_command_share_their_rows(rows):
    rows.share(["public/d", "public/x", "tests/gpt/a"])
    again = Rows(rows.file)
    assert [again.result("public/x", run) for run in ("mom", "softmax", "resumed")] == [TRAINS, TRAINS, FAILS]
    assert again.result("tests/gpt/a", "mom") == REFUSED
    rows.add(set="public/d", run="mom", processes="2", result=FAILS, reason="", seconds="1.0")
    rows.share(["public/d", "public/x"], "mom")
    assert Rows(rows.file).result("public/x", "mom") == FAILS
