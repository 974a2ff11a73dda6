"""Multi-query associative recall: MoM beside baselines of equal state, parameters and time, trained on the spot.

The command line is linear_moe/commands/arguments/recall.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")  # hardware queues, so that streams do not wait in line

import torch  # noqa: E402

from linear_moe.commands import run_command  # noqa: E402
from linear_moe.commands.arguments.recall import parse_arguments  # noqa: E402
from linear_moe.recall import records  # noqa: E402
from linear_moe.recall.baselines import names_of_set, parse_mom  # noqa: E402
from linear_moe.recall.models import Mixer, Shape  # noqa: E402
from linear_moe.recall.names import MATCHES  # noqa: E402
from linear_moe.recall.report import write_report  # noqa: E402
from linear_moe.recall.runs import Plan, run  # noqa: E402
from linear_moe.recall.task import Task  # noqa: E402
from linear_moe.recall.training import Settings, Training  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns 0, or 1 for settings that do not fit together. SystemExit(2): a wrong command line."""
    start = time.monotonic()
    args = parse_arguments(argv)
    words = shlex.join(["tools/recall.py", *(sys.argv[1:] if argv is None else argv)])
    return run_command("recall.py", lambda: recall(args, start + args.time_limit, words), ValueError)


def recall(args: argparse.Namespace, deadline: float, words: str) -> None:
    """Trains until the deadline, on the clock of ``time.monotonic``, and writes rows, table and pictures.

    Raises ValueError for settings that do not fit together, or that need more memory than a GPU has.
    """
    plan = plan_of(args)
    devices = find_devices(args.device)
    commit = args.commit or records.commit_of(Path(__file__).parents[2])
    try:
        comparisons, times, is_whole = run(
            plan, args.output, devices, deadline, records.origin(devices[0], commit, words), say
        )
    except torch.OutOfMemoryError as error:
        raise ValueError(f"{error}: use a smaller --group-size than {args.group_size}") from error
    text, written = write_report(plan, comparisons, times, args.output)
    say("\n" + text + "\n".join(map(str, written)))
    if not is_whole:
        say("some models are still to be trained: the same command goes on with them")


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises ValueError for settings that do not fit together."""
    for name in ("rates", "seeds", "pairs"):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"--{name} has a value twice: {getattr(args, name)}")
    base = Mixer(args.rule, args.heads, args.head_dim, args.head_dim)
    moms = [parse_mom(text, base) for text in args.mom or names_of_set(args.set)]
    training = Training(
        steps=args.steps,
        weight_decay=args.weight_decay,
        balancing=args.balancing,
        evaluations=args.evaluations,
    )
    return Plan(
        moms=tuple(dict.fromkeys(moms)),
        settings=Settings(
            Task(args.vocabulary, args.length, tuple(sorted(args.pairs)), args.batch),
            Shape(args.layers, args.hidden, args.mlp),
            training,
        ),
        max_steps=args.max_steps,
        rates=tuple(args.rates),
        seeds=tuple(args.seeds),
        baselines=tuple(name for key, name in MATCHES.items() if key in args.baselines),
        all_rates=args.all_rates,
        group_size=args.group_size,
    )


def find_devices(kind: str) -> list[torch.device]:
    """Every GPU, or the CPU. Raises ValueError for a GPU where there is none."""
    if kind == "cpu":
        return [torch.device("cpu")]
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that PyTorch can use")
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def say(line: str) -> None:
    print(line, flush=True)
