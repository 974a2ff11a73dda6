"""The command `linear-moe`: which commands there are, their help, and what a wrong command line gets."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from linear_moe import __version__, cli

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(autouse=True)
def command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in cli.COMMANDS)
    assert cli.main([]) == 2
    capsys.readouterr()
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"linear-moe {__version__}\n"


def test_every_command_has_a_module():
    for name in cli.COMMANDS:
        if name != "pretrain":
            assert find_spec(f"linear_moe.commands.{cli.module_of(name)}"), name


def test_the_tools_name_their_commands():
    for file in TOOLS.glob("*.py"):
        if "from linear_moe.commands import run" in file.read_text():
            assert cli.find_command(file.name) in cli.COMMANDS, file


@pytest.mark.parametrize(
    ("word", "hint"), [("convert-to-fh", "did you mean convert-to-hf?"), ("xyz", "there are demo, ")]
)
def test_an_unknown_command(word, hint, capsys):
    assert cli.main([word]) == 2
    assert f"there is no command {word!r}: {hint}" in capsys.readouterr().err


def test_a_missing_package_is_named():
    """As in an environment with the core alone."""
    hide = "import sys; sys.modules['transformers'] = None; sys.modules['tqdm'] = None; from linear_moe import cli; "
    words = "['generate', '--load', 'x']"
    done = subprocess.run([sys.executable, "-c", f"{hide}sys.exit(cli.main({words}))"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "linear-moe generate: error: this needs t" in done.stderr
    assert "pip install 'linear-moe[train]'" in done.stderr


def test_help_of_pretrain_has_examples(capsys):
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--help-mom" in text and "torchrun --nproc-per-node 8 -m linear_moe.pretrain" in text
