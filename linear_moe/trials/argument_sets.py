"""Argument sets of Megatron's training scripts: from its functional tests, its example scripts, and a file of ours."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

SCRIPTS = ("pretrain_gpt.py", "pretrain_hybrid.py", "pretrain_mamba.py")
TEST_CASES = Path("tests/functional_tests/test_cases")
MODELS = ("gpt", "hybrid", "mixtral", "moe", "nemotron")
"""Folders of test cases whose models those scripts train."""
OTHER_SCRIPTS = ("--flextron",)
"""Options of the test cases in these folders that belong to a script of another name."""

Options = dict[str, tuple[str, ...]]
"""Option of a command line -> its values; none for a switch."""


@dataclass(frozen=True)
class ArgumentSet:
    """A training command.

    name: where the set comes from, and which one it is, as "tests/moe/gpt3_mcore_te_tp2_pp1_te_8experts".
    script: the file name of Megatron's script.
    options: in the order of the command line; of an option that is given twice, the last.
    """

    name: str
    script: str
    options: Options


def to_options(words: list[str]) -> Options:
    """The options of a command line. Raises ValueError for words before the first option."""
    options: dict[str, list[str]] = {}
    values = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            options.pop(name, None)
            values = options[name] = [value] if equals else []
        elif values is None:
            raise ValueError(f"{word!r} stands before the first option")
        else:
            values.append(word)
    return {name: tuple(values) for name, values in options.items()}


def to_words(options: Options) -> list[str]:
    """The command line of options."""
    return [word for name, values in options.items() for word in (name, *values)]


def from_test_cases(clone: Path) -> list[ArgumentSet]:
    """The training commands of Megatron's functional tests.

    clone: a clone of Megatron-LM. Raises ValueError where there are no test cases.
    """
    folder = clone / TEST_CASES
    found = [
        ArgumentSet(f"tests/{file.parent.relative_to(folder)}", script, options)
        for model in MODELS
        for file in sorted(folder.glob(f"{model}/*/model_config.yaml"))
        if (options := _training_options(yaml.safe_load(file.read_text()))) is not None
        for script in ("pretrain_hybrid.py" if "--hybrid-layer-pattern" in options else "pretrain_gpt.py",)
    ]
    if not found:
        raise ValueError(f"{clone} has no training commands in {TEST_CASES}: give a clone of Megatron-LM")
    return found


def _training_options(case: dict) -> Options | None:
    """The options of a test case; None for a test of something else than pretraining."""
    arguments = case.get("MODEL_ARGS")
    if case.get("MODE", "pretraining") != "pretraining" or not arguments or any(map(arguments.get, OTHER_SCRIPTS)):
        return None
    return {name: _values(value) for name, value in arguments.items() if value not in ("", None, False)}


def _values(value: object) -> tuple[str, ...]:
    """The words that Megatron's test runner makes of a value of a YAML file: lists stand in brackets there. The runner
    repeats a test, and ${REPEAT} counts the repetitions.
    """
    text = str(value).strip().replace("${REPEAT}", "1")
    if value is True:
        return ()
    if re.fullmatch(r"\[[^\]]*\]", text):
        return tuple(text[1:-1].split())
    return (text,)


def from_examples(clone: Path) -> list[ArgumentSet]:
    """The training commands of the shell scripts under examples/ that start one of `SCRIPTS`. Runs the shell scripts,
    with nothing in their reach but the shell itself: every program that would train only says what its words are.
    """
    scripts = sorted((clone / "examples").rglob("*.sh"))
    starts = re.compile("|".join(map(re.escape, SCRIPTS)))
    return [
        ArgumentSet(f"examples/{script.relative_to(clone / 'examples').with_suffix('')}", *found)
        for script in scripts
        if starts.search(script.read_text(errors="replace"))
        for found in _started(script)
        if found[1]
    ]


KIND = (
    "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size",
    "--expert-model-parallel-size", "--expert-tensor-parallel-size", "--num-layers-per-virtual-pipeline-stage",
    "--num-virtual-stages-per-pipeline-rank", "--pipeline-model-parallel-layout", "--num-experts",
    "--moe-token-dispatcher-type", "--multi-latent-attention", "--mtp-num-layers", "--experimental-attention-variant",
    "--use-distributed-optimizer", "--optimizer", "--fp16", "--fp8-format", "--ckpt-format", "--use-megatron-fsdp",
    "--use-torch-fsdp2", "--hybrid-layer-pattern", "--recompute-granularity", "--cuda-graph-impl",
    "--transformer-impl", "--overlap-moe-expert-parallel-comm", "--calculate-per-token-loss", "--rerun-mode",
)  # fmt: skip
"""Options that make a command another kind of command; sizes of parallel axes count as present or absent."""


def kind_of(given: ArgumentSet) -> tuple[str, ...]:
    """What a command has of `KIND`, with the value where that is a word."""
    parts = (f"{name} {' '.join(given.options[name])}" for name in KIND if name in given.options)
    sizes = (re.sub(r" 1$", " one", part) for part in parts if not part.startswith("--hybrid-layer-pattern"))
    return given.script, *(re.sub(r" [\d(E].*$", "", size) for size in sizes if not size.endswith(" one"))


def one_of_each_kind(sets: list[ArgumentSet]) -> list[ArgumentSet]:
    """The first set of each kind."""
    return list({kind_of(given): given for given in reversed(sets)}.values())[::-1]


RECORDER = """#!/bin/sh
printf '%s\\n' "$@" > "$WORDS"
"""
STARTERS = ("torchrun", "python", "python3", "uv", "srun", "accelerate")
NOTHING_TO_DO = ("mkdir", "nvidia-smi")
TOOLS = ("basename", "cat", "date", "dirname", "hostname", "sed", "grep", "head", "wc", "tr", "cut")


ARGUMENTS = (tuple(f"argument{number}" for number in range(1, 7)), ("--checkpoint-path", "."))
"""What example scripts take behind their names: folders and files, or options."""


def _started(script: Path) -> Iterator[tuple[str, Options]]:
    """The name of Megatron's script that a shell script starts, and its options, if the shell script comes so far."""
    for arguments in ARGUMENTS:
        words = _recorded_words(script, arguments)
        for position, word in enumerate(words):
            if Path(word).name in SCRIPTS:
                yield Path(word).name, to_options(words[position + 1 :])
                return


def _recorded_words(script: Path, arguments: Iterable[str]) -> list[str]:
    """The words of the program for training that a shell script starts last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        programs, record, place = folder / "programs", folder / "words", folder / "a" / "b"
        programs.mkdir()
        place.mkdir(parents=True)
        for program in STARTERS:
            (programs / program).write_text(RECORDER)
            (programs / program).chmod(0o755)
        for program in TOOLS:
            if (found := shutil.which(program)) is not None:
                (programs / program).symlink_to(found)
        for program in NOTHING_TO_DO:
            (programs / program).symlink_to(shutil.which("true"))
        for known in SCRIPTS:  # scripts look whether their target is there
            (place / known).touch()
        environment = {"PATH": str(programs), "WORDS": str(record), "HOME": name, "WORLD_SIZE": "1", "TMPDIR": name}
        command = [shutil.which("bash"), str(script), *arguments]
        try:
            subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=30)
        except subprocess.TimeoutExpired:
            return []
        if not record.is_file():
            return []
        text = record.read_text()
        words = [word for line in text.splitlines() for word in _unquoted(line)]
        if not any(Path(word).name in SCRIPTS for word in words):  # the program got a command line as one word
            words = text.split()
        return [word.strip("'\"") for word in words]


def _unquoted(line: str) -> list[str]:
    """The words of a recorded word. Arrays of shell scripts have elements such as ``--fp8-format hybrid``."""
    return [line] if " " not in line or not line.startswith("--") else [word.strip("'\"") for word in line.split()]


def from_file(file: Path) -> list[ArgumentSet]:
    """The training commands of a YAML file: name -> script, source and the arguments as one text.

    Raises ValueError for a file of another form.
    """
    entries = yaml.safe_load(file.read_text())
    try:
        return [
            ArgumentSet(f"public/{name}", entry["script"], to_options(entry["arguments"].split()))
            for name, entry in entries.items()
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected name: {{script: ..., arguments: ...}}, got {error!r}") from error
