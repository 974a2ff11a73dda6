"""The command `linear-moe`: one name for everything that this project does from a shell.

    linear-moe demo
    linear-moe pretrain --token-mixer mom <Megatron's arguments>
    linear-moe convert-to-hf --load runs/demo/checkpoints --save runs/demo/hf

`python -m linear_moe.cli` is the same where the package is on PYTHONPATH only.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from linear_moe import __version__

PROGRAM = "linear-moe"
COMMANDS = {
    "demo": "trains a small model on this machine, in a few minutes",
    "pretrain": "trains with Megatron's training loop and arguments",
    "preprocess": "turns texts into the token files that training reads",
    "convert-to-hf": "turns a Megatron checkpoint into a folder for Hugging Face's transformers",
    "convert-from-hf": "turns a Hugging Face folder into a Megatron checkpoint",
    "align-mixers": "puts memories into a Transformer, and trains the new token mixers alone",
    "generate": "writes text with a model of either format",
    "perplexity": "measures the loss along the context, far past the training length",
    "evaluate": "runs tasks of lm-evaluation-harness on a model of either format",
    "plot": "draws pictures of a run from its TensorBoard files",
    "recall": "trains MoM and baselines on the associative recall task",
    "language-models": "trains language models that differ in the token mixer alone, and measures what they recall",
    "results": "trains and measures what RESULTS.md reports, and writes RESULTS.md",
    "try-megatron-commands": "tries public commands of Megatron-LM with MoM, shrunk to a CPU",
    "doctor": "says what is installed here, which GPUs there are, and what works; --kernels checks the kernels",
    "demo-corpus": "makes a small corpus from the Python installation",
}
"""A command a line: its name, and what it does. Its module is linear_moe.commands.<name>, with `main(argv)`."""
MODULES = {"preprocess": "preprocess_data", "plot": "plot_run"}
"""Commands whose modules have another name."""
ARGUMENTS_ROOM = "linear_moe.commands.arguments"
"""Command lines, a module a command, which import neither torch nor transformers: --help answers at once."""

PRETRAIN_HELP = """usage: linear-moe pretrain --token-mixer mom <Megatron's arguments>

Trains a language model with Megatron's training loop. Every argument of Megatron keeps its meaning; --token-mixer mom
replaces softmax attention by Mixture-of-Memories, and --mom-num-memories 4 --mom-topk 2 ... set its sizes.

  --help-mom     the arguments of this project alone
  --help-all     the arguments of this project and of Megatron
  --verbose      all that Megatron prints goes to the screen, too, not only to the log file

examples:
  a model of a few million parameters on mock data, without a GPU:
    linear-moe pretrain --token-mixer mom --mom-num-heads 2 --mom-head-dim 64 --num-layers 4 --hidden-size 256 \\
        --num-attention-heads 4 --swiglu --normalization RMSNorm --disable-bias-linear --seq-length 256 \\
        --max-position-embeddings 256 --micro-batch-size 4 --global-batch-size 4 --train-iters 20 --lr 1e-3 \\
        --mock-data --tokenizer-type NullTokenizer --vocab-size 4096 --log-interval 1 --eval-iters 0 \\
        --attention-dropout 0 --hidden-dropout 0
  on the 8 GPUs of a machine:
    torchrun --nproc-per-node 8 -m linear_moe.pretrain --token-mixer mom <Megatron's arguments>
  the script of Megatron-LM that you have:
    python -m linear_moe path/to/pretrain_gpt.py <your arguments> --token-mixer mom
"""


def usage() -> str:
    """What `linear-moe --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {about}" for name, about in COMMANDS.items())
    return (
        f"usage: {PROGRAM} COMMAND ...\n\nMixture-of-Memories for Megatron, version {__version__}.\n\n{commands}\n\n"
        f"{PROGRAM} COMMAND --help shows a command's arguments, with examples."
    )


def find_command(word: str) -> str | None:
    """The command that a word names. A module's name, and that of a file in tools/, name its command too."""
    module = word.removesuffix(".py").replace("-", "_")
    names = {module_of(command): command for command in COMMANDS}
    return word if word in COMMANDS else names.get(module)


def module_of(command: str) -> str:
    """The name of a command's module."""
    return MODULES.get(command, command.replace("-", "_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first word names. Returns the exit status: 2 for a wrong command line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    command = find_command(words[0])
    if command is None:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}"
        print(f"{PROGRAM}: error: there is no command {words[0]!r}: {hint}", file=sys.stderr)
        return 2
    sys.argv = [f"{PROGRAM} {command}", *words[1:]]  # for the messages of argparse
    try:
        return run_command(command, words[1:])
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("linear_moe", "mom_layers", "megatron_patches"):
            raise
        print(
            f"{PROGRAM} {command}: error: this needs {error.name}, which is not installed for {sys.executable}: "
            f"pip install 'linear-moe[train]' installs what every command needs. "
            f"{PROGRAM} doctor shows what is there",
            file=sys.stderr,
        )
        return 1


def run_command(command: str, words: list[str]) -> int:
    """Runs a command with the words after its name."""
    if command == "pretrain":
        if {"-h", "--help"} & set(words):
            print(PRETRAIN_HELP, end="")
            return 0
        sys.argv[1:] = ["--help" if word == "--help-all" else word for word in words]
        return import_module("linear_moe.pretrain").run()
    module = module_of(command)
    if {"-h", "--help"} & set(words) and find_spec(f"{ARGUMENTS_ROOM}.{module}"):
        import_module(f"{ARGUMENTS_ROOM}.{module}").parse_arguments(words)  # prints the help, and ends the program
    return import_module("linear_moe.commands").run(module)


if __name__ == "__main__":
    sys.exit(main())
