"""All commands have one shape, and one path from an error to the exit status."""

import argparse
import errno
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from safetensors import SafetensorError

from linear_moe.commands import run_command
from linear_moe.commands.values import fraction, positive, share, whole

TOOLS = Path(__file__).parents[2] / "tools"
COMMANDS = sorted(
    found[1] for file in TOOLS.glob("*.py") if (found := re.search(r"sys\.exit\(run\(\"(\w+)\"\)\)", file.read_text()))
)


def test_every_tool_is_a_command():
    assert COMMANDS == [
        "align_mixers", "convert_from_hf", "convert_to_hf", "demo_corpus", "evaluate", "generate", "language_models",
        "perplexity", "plot_run", "preprocess_data", "recall", "results", "try_megatron_commands",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_one_shape(name, capsys):
    command = import_module(f"linear_moe.commands.{name}")
    assert list(inspect.signature(command.main).parameters) == ["argv"]
    assert list(inspect.signature(command.parse_arguments).parameters) == ["argv"]
    for words, status in [(["--help"], 0), (["--no-such-option"], 2)]:
        with pytest.raises(SystemExit) as end:
            command.main(words)
        assert end.value.code == status
    assert "usage: " in capsys.readouterr().out


class UnusableError(ValueError):
    pass


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (UnusableError("the file has no text\n  line 1"), 1, "tool.py: error: the file has no text\n  line 1\nNote.\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), 1, "tool.py: error: No such file: x\nNote.\n"),
        (OSError(errno.ENOSPC, "No space", "x"), 1, "tool.py: error: No space: x; nothing was written\nNote.\n"),
        (SafetensorError("broken\nheader"), 1, "tool.py: error: broken header; nothing was written\nNote.\n"),
        (KeyboardInterrupt(), 130, "tool.py: error: interrupted\nNote.\n"),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_status(error, status, printed, capsys):
    def work():
        raise error

    assert run_command("tool.py", work, UnusableError, note="Note.") == status
    assert capsys.readouterr().err == printed


def test_work_without_an_error_returns_0_and_another_error_passes(capsys):
    assert run_command("tool.py", lambda: "done") == 0
    assert capsys.readouterr() == ("", "")
    with pytest.raises(UnusableError):
        run_command("tool.py", lambda: (_ for _ in ()).throw(UnusableError()))


@pytest.mark.parametrize(
    ("kind", "accepted", "refused"),
    [
        (whole(0), ["0", "7"], ["-1", "1.5", "x", ""]),
        (whole(1), ["1"], ["0", "9" * 30, "9" * 9999]),
        (whole(1, 8), ["8"], ["9"]),
        (positive, ["0.5", "3"], ["0", "-1", "inf", "nan", "x"]),
        (share, ["0.1", "1"], ["0", "1.1", "nan"]),
        (fraction, ["0", "0.9"], ["1", "-0.1", "nan"]),
    ],
)
def test_numbers_of_a_command_line(kind, accepted, refused):
    assert [kind(text) for text in accepted] == [float(text) for text in accepted]
    for text in refused:
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{re.escape(text)}': expected a"):
            kind(text)
