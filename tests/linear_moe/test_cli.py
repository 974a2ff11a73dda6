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


def test_help_answers_without_torch():
    """PyTorch and transformers take seconds to import."""
    program = (
        "import contextlib, sys; from linear_moe import cli\n"
        f"for name in {list(cli.COMMANDS)}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        cli.main([name, '--help'])\n"
        "assert not {'torch', 'transformers', 'megatron', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("examples:") == len(cli.COMMANDS)
    assert done.stdout.count("\n    linear-moe convert-to-hf --load") == 2


def test_names_of_types():
    from linear_moe.commands import values
    from linear_moe.conversion.config import DTYPES

    assert values.DTYPES == tuple(DTYPES)


def test_demo_runs_its_steps_in_order(tmp_path, monkeypatch, capsys):
    from linear_moe.commands import demo

    calls = []
    monkeypatch.setattr(demo, "run_to_end", lambda *words, **options: calls.append(list(map(str, words))))
    assert demo.main(["--output", str(tmp_path / "out"), "--steps", "7", "--processes", "2"]) == 0
    assert [words[2] for words in calls] == ["demo-corpus", "preprocess", "--nproc-per-node", "plot"]
    training = calls[2]
    assert training[training.index("--train-iters") + 1] == "7" and int(training[training.index("--master-port") + 1])
    assert training[training.index("--log-file") + 1] == str(tmp_path / "out" / "log.txt")
    assert f"linear-moe generate --load {tmp_path / 'out' / 'hf'} --prompt" in capsys.readouterr().out
    (tmp_path / "out" / "corpus.json").touch()
    assert demo.main(["--output", str(tmp_path / "out")]) == 0
    assert [words[2] for words in calls[4:]] == ["--nproc-per-node", "plot"]
    with pytest.raises(SystemExit):
        demo.main(["--processes", "3"])


def test_a_failed_step_of_the_demo_is_named(capsys):
    from linear_moe.commands import demo

    with pytest.raises(demo.DemoError, match="failed with exit status 3: .* -c"):
        demo.run_to_end("-c", "import sys; sys.exit(3)")
