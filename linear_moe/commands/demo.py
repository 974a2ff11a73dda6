"""Trains a small Mixture-of-Memories model on the Python installation's own texts, in a few minutes on two CPU cores.

    linear-moe demo
    linear-moe demo --output runs/demo --steps 500

Writes the corpus, its tokens, a checkpoint and the pictures of the run into one folder, and prints the next commands.
Started again, the command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from linear_moe.commands import run_command
from linear_moe.commands.command_line import command_parser
from linear_moe.commands.values import path, whole

VOCABULARY = 4096
SEQUENCES = 8  # a step
MODEL = (
    "--token-mixer mom --mom-num-memories 4 --mom-topk 2 --mom-shared-memory --mom-num-heads 2 --mom-head-dim 64 "
    "--mom-aux-loss-coeff 1e-3 --num-layers 4 --hidden-size 256 --ffn-hidden-size 512 --swiglu "
    "--num-attention-heads 4 --position-embedding-type rope --normalization RMSNorm --norm-epsilon 1e-6 "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --seq-length 256 --max-position-embeddings 256"
).split()
TRAINING = (
    "--optimizer adam --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.01 --clip-grad 1.0 --lr 2e-3 --min-lr 3e-5 "
    "--lr-decay-style cosine --lr-warmup-fraction 0.01 --use-distributed-optimizer --eval-interval 50 --eval-iters 8 "
    "--save-interval 50 --log-interval 10 --tensorboard-log-interval 10 --dist-ckpt-optim-fully-reshardable "
    "--no-create-attention-mask-in-dataloader --exit-signal-handler --tokenizer-type HuggingFaceTokenizer"
).split()
"""The model and the training of examples/pretrain_mom_a100.sh on a machine without a GPU."""


class DemoError(RuntimeError):
    """A step of the demo failed; the step has said why."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 where a step fails."""
    args = parse_arguments(argv)
    return run_command("demo", lambda: demo(args), DemoError)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--output", type=path, default=Path("mom-demo"), metavar="DIR", help="folder [%(default)s]")
    parser.add_argument("--steps", type=whole(1), default=200, help="training steps [%(default)s]")
    parser.add_argument(
        "--processes",
        type=whole(1, SEQUENCES),
        default=min(2, os.cpu_count() or 1),
        help="training processes, a divisor of 8; without a GPU two of one thread are faster than one [%(default)s]",
    )
    args = parser.parse_args(argv)
    if SEQUENCES % args.processes:
        parser.error(f"--processes {args.processes}: expected a divisor of {SEQUENCES}")
    return args


def demo(args: argparse.Namespace) -> None:
    """Runs the steps in order, each in a process of its own. Raises DemoError where one fails."""
    folder = args.output
    corpus, checkpoints, board = folder / "corpus", folder / "checkpoints", folder / "tensorboard"
    write_corpus(folder)
    batch = ["--micro-batch-size", SEQUENCES // args.processes, "--global-batch-size", SEQUENCES]
    data = data_options(folder, corpus)
    files = ["--save", checkpoints, "--load", checkpoints, "--tensorboard-dir", board, "--log-file", folder / "log.txt"]
    launch = ["-m", "linear_moe.entry.launch", "--nproc-per-node", args.processes, "--master-port", free_port(), "-m"]
    run_to_end(
        *launch, "linear_moe.pretrain", *MODEL, *TRAINING, "--train-iters", args.steps, *batch, *data, *files,
        threads=max((os.cpu_count() or 1) // args.processes, 1),
    )  # fmt: skip
    _step("plot", "--tensorboard-dir", board, "--output", folder)
    export, load = shlex.quote(str(folder / "hf")), shlex.quote(str(checkpoints))
    print(f"next:  linear-moe convert-to-hf --load {load} --save {export}")
    print(f'       linear-moe generate --load {export} --prompt "def forward(self"')


def write_corpus(folder: Path) -> None:
    """Writes the corpus and its tokens into a folder that does not have them."""
    corpus = folder / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    if not Path(f"{corpus}.json").exists():
        _step("demo-corpus", "--output", f"{corpus}.jsonl", "--overwrite")
        _step(
            "preprocess", "--input", f"{corpus}.jsonl", "--output", corpus, "--train-tokenizer", VOCABULARY,
            "--validation-fraction", 0.05, "--overwrite",
        )  # fmt: skip


def data_options(folder: Path, corpus: Path) -> list[object]:
    """The options of a training on the corpus."""
    return [
        "--tokenizer-model", f"{corpus}-tokenizer", "--train-data-path", f"{corpus}-train", "--valid-data-path",
        f"{corpus}-valid", "--data-cache-path", folder / "data-cache",
    ]  # fmt: skip


def free_port() -> int:
    """A port of this machine that no program listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def _step(*words: object) -> None:
    run_to_end("-m", "linear_moe.cli", *words)


def run_to_end(*words: object, threads: int | None = None) -> None:
    """Runs this interpreter with the words. Raises DemoError for another exit status than 0.

    threads: of every process, where the user has not set OMP_NUM_THREADS.
    """
    environment = dict(os.environ)
    if threads:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    command = [sys.executable, *map(str, words)]
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    except BaseException:  # a signal, which reaches the process group or this process alone
        process.terminate()
        process.wait()
        raise
    if status:
        raise DemoError(f"this failed with exit status {status}: {shlex.join(command)}")
