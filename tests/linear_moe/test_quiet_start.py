"""What a run shows on the screen, what is in its log, and what it shows when it fails."""

import io
import logging
import re
import subprocess
import sys

from pretraining_runs import MOM, TINY, pretrain

from linear_moe.entry import log
from linear_moe.pretrain import log_path, take_option

STEP = re.compile(r"^step +1/", re.MULTILINE)


def replace_screens(monkeypatch):
    """New standard streams. In the test itself: pytest sets its own before every test's body."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sys, "argv", ["pretrain"])
    monkeypatch.delenv("MOM_VERBOSE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    return out, err


def test_a_run_starts_with_a_banner(tmp_path):
    run = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 2, "--save", tmp_path, "--save-interval", 2)
    assert run.returncode == 0, run.stdout[-3000:]
    before = run.stdout[: STEP.search(run.stdout).start()].splitlines()
    names = [line.split()[0] for line in before]
    assert names == ["model", "size", "layout", "data", "training", "start", "saves", "machine", "patches", "log"]
    assert "115k parameters" in before[1] and str(tmp_path / "log.txt") in before[-1]
    assert "successfully saved checkpoint" in run.stdout and "validation at step 2" in run.stdout
    kept = (tmp_path / "log.txt").read_text()
    for text in ("end of arguments", "patch console applied", "UserWarning", "step  2/2"):
        assert text in kept
    assert "UserWarning" not in run.stdout and "DEPRECATED" not in run.stdout


def test_nothing_of_megatron_is_imported_before_the_screen_is_quiet():
    """Megatron warns, while it is imported, of every package that is missing."""
    program = "import sys, linear_moe.pretrain; print([name for name in sys.modules if name.startswith('megatron.')])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and run.stdout.strip() == "[]", run.stdout + run.stderr


def test_a_run_without_validation_needs_no_interval():
    """As in the first example of `linear-moe pretrain --help`."""
    words = list(TINY)
    first = words.index("--eval-iters")
    assert words[first : first + 4] == ["--eval-iters", "1", "--eval-interval", "100"]
    words[first : first + 4] = ["--eval-iters", "0"]
    run = pretrain(*words, *MOM, "--mock-data", "--train-iters", 1)
    assert run.returncode == 0 and STEP.search(run.stdout), run.stdout[-3000:]
    assert "validation" not in run.stdout


def test_verbose_brings_everything_to_the_screen():
    run = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 1, "--verbose")
    assert "end of arguments" in run.stdout and "patch console applied" in run.stdout


def test_lines_wait_for_the_file_and_for_a_failure(monkeypatch, tmp_path):
    out, err = replace_screens(monkeypatch)
    streams = log.QuietStreams()
    print("noise")
    print("step   1/2 | loss 3.0")
    logging.getLogger("elsewhere").warning("not shown")
    streams.log.open(tmp_path / "a" / "log.txt")
    print("patch example applied: to test")
    print("unfinished ", end="")
    print("line")
    assert out.getvalue() == "step   1/2 | loss 3.0\n" and err.getvalue() == ""
    streams.end(failed=True)
    print("as before")
    assert (tmp_path / "a" / "log.txt").read_text().splitlines()[:2] == ["noise", "step   1/2 | loss 3.0"]
    assert err.getvalue().splitlines() == [
        f"what the run printed before the error (the whole log is {tmp_path / 'a' / 'log.txt'}):",
        "noise", "step   1/2 | loss 3.0", "unfinished line",
    ]  # fmt: skip
    assert out.getvalue().endswith("as before\n")


def test_another_rank_shows_its_error_alone(monkeypatch):
    _, err = replace_screens(monkeypatch)
    monkeypatch.setenv("LOCAL_RANK", "1")
    streams = log.QuietStreams()
    print("noise")
    streams.end(failed=True)
    assert err.getvalue() == ""


def test_a_log_that_cannot_be_written(monkeypatch, tmp_path):
    _, err = replace_screens(monkeypatch)
    (tmp_path / "file").touch()
    streams = log.QuietStreams()
    streams.log.open(tmp_path / "file" / "log.txt")
    print("noise")
    assert streams.log.path is None
    streams.end(failed=True)
    assert "noise" in err.getvalue() and "--verbose shows everything" in err.getvalue()


def test_options_of_the_entry(monkeypatch):
    words = ["x", "--log-file", "a.txt", "--lr", "1"]
    assert take_option(words, "--log-file") == "a.txt" and words == ["x", "--lr", "1"]
    assert take_option(["x", "--log-file=b"], "--log-file") == "b" and take_option(["x"], "--log-file") is None
    monkeypatch.setenv("GROUP_RANK", "2")
    assert log_path("out/log.txt").name == "log-node2.txt"


def test_a_mistyped_argument_gets_the_name_that_was_meant():
    run = pretrain(*TINY, *MOM, "--mock-data", "--train-iters", 1, "--mom-num-memory", 3)
    assert run.returncode == 2
    assert (
        "unrecognized arguments: --mom-num-memory 3\n  --mom-num-memory: did you mean --mom-num-memories?" in run.stdout
    )
    assert len(run.stdout.splitlines()) < 20


def test_help_of_our_arguments_alone():
    run = pretrain("--help-mom")
    assert run.returncode == 0 and "--mom-topk" in run.stdout and "--hidden-size" not in run.stdout
