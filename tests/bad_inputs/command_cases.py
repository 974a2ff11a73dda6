"""Bad values for every argument of the commands in tools/, each in a fork."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from forks import SECONDS, in_fork
from judge import Case, files, names

from linear_moe.commands import values as types

WORDS = "the memory of a sequence is a matrix and each token writes a little of it down before the next one comes "
MODEL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "num_memories": 2,
    "topk": 1, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip

TASKS = Path(__file__).parents[1] / "mom_layers" / "hf" / "lm_eval_tasks"


class Inputs:
    """What the commands read: a corpus, a tokenizer, an export, a checkpoint and a run's TensorBoard files."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter

        from linear_moe.commands import convert_from_hf
        from linear_moe.corpus.tokenizer import save_trained_tokenizer, train_tokenizer
        from mom_layers.hf import MomConfig, MomForCausalLM

        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.corpus, self.text = folder / "corpus.jsonl", folder / "text.txt"
        self.corpus.write_text("".join(json.dumps({"text": WORDS * (1 + n % 3)}) + "\n" for n in range(40)))
        self.text.write_text(WORDS * 20)
        self.tokenizer, self.hf, self.megatron = folder / "tokenizer", folder / "hf", folder / "megatron"
        save_trained_tokenizer(train_tokenizer([WORDS * 9], 300, self.tokenizer), self.tokenizer)
        torch.manual_seed(0)
        MomForCausalLM(MomConfig(**MODEL)).save_pretrained(self.hf)
        shutil.copytree(self.tokenizer, self.hf, dirs_exist_ok=True)
        self.events = folder / "events"
        with SummaryWriter(str(self.events)) as writer:
            for step in range(5):
                writer.add_scalar("lm loss", 5 - step, step)
        status, output = in_fork(lambda: convert_from_hf.main(["--load", str(self.hf), "--save", str(self.megatron)]))
        assert status == 0, output
        # What no program can read, for any user.
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "empty").touch()
        (folder / "empty folder").mkdir()

    def commands(self) -> dict[str, list[str]]:
        """Of every command: words that work. OUT stands for a new folder."""
        return {
            "demo_corpus": ["--output", "OUT/c.jsonl", "--max-bytes", "1000000"],
            "plot_run": ["--tensorboard-dir", f"{self.events}", "--output", "OUT/plots"],
            "preprocess_data": [
                "--input", f"{self.corpus}", "--output", "OUT/c", "--train-tokenizer", "300", "--workers", "1",
            ],
            "convert_from_hf": ["--load", f"{self.hf}", "--save", "OUT/megatron"],
            "convert_to_hf": ["--load", f"{self.megatron}", "--save", "OUT/hf"],
            "generate": ["--load", f"{self.hf}", "--prompt", "the memory", "--max-new-tokens", "2"],
            "perplexity": ["--load", f"{self.hf}", "--text", f"{self.text}", "--output", "OUT/p.png"],
            "evaluate": [
                "--load", f"{self.hf}", "--tasks", "recall_choice", "--include-path", f"{TASKS}", "--device", "cpu",
            ],
            "recall": [
                "--output", "OUT/recall", "--quick", "--mom", "2/1", "--baselines", "softmax", "--steps", "1",
                "--max-steps", "1", "--rates", "1e-3", "--seeds", "1", "--pairs", "2", "--length", "16",
                "--commit", "x",
            ],
        }  # fmt: skip


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command builds when it runs."""
    found = []

    class Stop(Exception):
        """The parser is complete."""

    def keep(parser, *_):
        found.append(parser)
        raise Stop

    before, argparse.ArgumentParser.parse_known_args = argparse.ArgumentParser.parse_known_args, keep
    try:
        import_module(f"linear_moe.commands.{command}").parse_arguments([])
    except Stop:
        pass
    finally:
        argparse.ArgumentParser.parse_known_args = before
    return found[0]


PATHS = (types.path, types.picture)


def values(action: argparse.Action, inputs: Path) -> Iterator[tuple[str, str]]:
    """The bad values of an argument that takes a value."""
    path = action.type in PATHS or action.dest == "output"
    yield "empty", ""
    if path:
        if action.dest not in ("output", "save", "tokenizer_output"):
            yield "missing path", f"{inputs}/nowhere/deep"
        yield "unreadable path", f"{inputs}/loop"
        yield "path through a file", f"{inputs}/text.txt/deep"
        yield "wrong type: a file", f"{inputs}/empty"
        yield "wrong type: a folder", f"{inputs}/empty folder"
        yield "huge", f"{inputs}/{'x' * 300}"
    else:
        yield "wrong type", "text of another kind"
        yield "negative", "-1"
        yield "zero", "0"
        yield "huge", "9" * 40
        yield "NaN", "nan"
        yield "fraction", "1.5"
        yield "very large", "9" * 12
        yield "tiny", "1e-300"


def judge(command: str, words: list[str], option: str, value: str, inputs: Inputs) -> str | None:
    """The fault of a command one of whose arguments has a bad value."""
    out = inputs.folder.parent / f"out-{os.getpid()}"
    out.mkdir()
    before = files(inputs.folder)
    try:
        words = [word.replace("OUT", str(out)) for word in words]
        status, output = in_fork(partial(import_module(f"linear_moe.commands.{command}").main, words))
        left = files(out)
        if files(inputs.folder) != before:
            return f"changed its input: {set(files(inputs.folder)) ^ set(before)}"
    finally:
        shutil.rmtree(out)
        for path in map(inputs.folder.joinpath, sorted(set(files(inputs.folder)) - set(before))):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if status is None:
        return f"no end in {SECONDS} s"
    if "Traceback" in output:
        return f"traceback: {output.strip().splitlines()[-1]}"
    if status == 0:
        return f"accepted: {output.strip()[-160:]}"
    if status < 0:
        return f"killed by signal {-status}"
    if left:
        return f"half-written: {list(left)[:4]}"
    said = output[output.find("error:") :] if "error:" in output else ""
    shown = (value[:100], str(Path(value).parent) if "/" in value else value)
    if not said or not (names(said, option, option[2:]) or repr(value) in said or any(s and s in said for s in shown)):
        return f"names neither argument nor value: {output.strip()[-200:]}"
    return None


FOLDER = {"wrong type: a folder"}
NUMBERS = {"negative", "zero", "huge", "NaN", "fraction", "very large", "tiny", "wrong type"}
LARGE = {"huge", "very large"}
FINE = {
    ("plot_run", "--output"): FOLDER, ("recall", "--output"): FOLDER, ("convert_from_hf", "--save"): FOLDER,
    ("convert_to_hf", "--save"): FOLDER, ("preprocess_data", "--tokenizer-output"): FOLDER,
    # suffixes are added to the name
    ("perplexity", "--output"): {"unreadable path", "wrong type: a file"},
    ("preprocess_data", "--output"): {"unreadable path", "wrong type: a file", "wrong type: a folder"},
    ("generate", "--prompt"): NUMBERS | {"empty"}, ("generate", "--temperature"): {"fraction"},
    ("generate", "--seed"): {"zero"}, ("generate", "--top-k"): {"zero", *LARGE}, ("generate", "--top-p"): {"tiny"},
    ("generate", "--prompt-file"): {"wrong type: a file"}, ("generate", "--max-new-tokens"): {"very large"},
    ("perplexity", "--lengths"): {"very large"}, ("perplexity", "--batch-size"): {"very large"},
    ("perplexity", "--max-windows"): {"very large"}, ("perplexity", "--stride"): {"very large"},
    ("perplexity", "--train-length"): {"very large"}, ("perplexity", "--chunk-size"): {"very large"},
    ("convert_to_hf", "--verify-bound"): {"zero", "fraction", "tiny", *LARGE},
    ("convert_to_hf", "--verify-tokens"): {"very large"},  # without --verify
    ("convert_to_hf", "--max-shard-size"): {"very large"},
    ("convert_to_hf", "--name"): NUMBERS, ("convert_to_hf", "--license"): NUMBERS,
    ("convert_to_hf", "--language"): NUMBERS, ("convert_to_hf", "--datasets"): NUMBERS,
    ("evaluate", "--output"): {"unreadable path", "wrong type: a file"}, ("evaluate", "--num-fewshot"): {"zero"},
    ("evaluate", "--limit"): {"very large"}, ("evaluate", "--max-length"): {"very large"},
    ("evaluate", "--batch-size"): {"very large"},
    ("plot_run", "--reference-loss"): {"zero", "fraction", "tiny", *LARGE}, ("demo_corpus", "--max-bytes"): LARGE,
    ("preprocess_data", "--max-bad-lines"): {"zero", "very large"},
    ("preprocess_data", "--validation-fraction"): {"zero"}, ("preprocess_data", "--tokenizer-bytes"): {"very large"},
    ("recall", "--seeds"): {"zero"}, ("recall", "--commit"): NUMBERS | {"empty"}, ("recall", "--mlp"): {"zero"},
    ("recall", "--weight-decay"): {"zero", "fraction", "tiny"}, ("recall", "--rates"): {"fraction", "tiny"},
    ("recall", "--balancing"): {"zero", "fraction", "tiny"},
    ("recall", "--time-limit"): {"zero", "fraction", "tiny", *LARGE}, ("recall", "--steps"): {"very large"},
    ("recall", "--max-steps"): {"very large"}, ("recall", "--evaluations"): {"very large"},
    ("recall", "--group-size"): {"very large"},
}  # fmt: skip
"""By command and option: values that are bad in general and that work here."""


def command_cases(folder: Path) -> list[Case]:
    inputs, cases = Inputs(folder / "inputs"), []
    for command, words in inputs.commands().items():
        for action in parser_of(command)._actions:
            if not action.option_strings or action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
                continue
            option = action.option_strings[-1]
            for kind, value in values(action, inputs.folder):
                if kind in FINE.get((command, option), ()):
                    continue
                given = [f"{option}={value}"] if action.nargs is None else [option, value]
                given += ["label"] if action.nargs == 2 else []
                rest = without(words, option)
                run = partial(judge, command, [*rest, *given], option, value, inputs)
                cases.append(Case(command, option, kind, run))
    return cases


def without(words: list[str], option: str) -> list[str]:
    """The words without an option and its value; also without what excludes the option."""
    excluded = {"--tokenizer": "--train-tokenizer", "--prompt-file": "--prompt"}.get(option)
    for name in (option, excluded):
        if name in words:
            place = words.index(name)
            words = [*words[:place], *words[place + 2 :]]
    return words
