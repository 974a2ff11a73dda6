"""Language models on real text that differ in the token mixer alone, trained by Megatron, measured on held-out text.

The command line is linear_moe/commands/arguments/language_models.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import torch

from linear_moe.commands import preprocess_data, run_command
from linear_moe.commands.arguments.language_models import SETS, parse_arguments
from linear_moe.corpus.files import CorpusError
from linear_moe.evidence import fit, held_out, tables, texts
from linear_moe.evidence.jobs import Job, Shape, Training, make_job
from linear_moe.evidence.report import write_report
from linear_moe.evidence.runs import Device, Place, RunFailed, is_finished, run_all
from linear_moe.recall import records
from linear_moe.temporary import replaced_file

RUNS_ON_CPU = 2  # tiny models keep one core busy each
CORPUS = "corpus.json"
FITTED = "fitted.json"  # tokens that --fit-time chose


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool. Returns 0, or 1 for settings that do not fit together, too little text, and models that failed.
    SystemExit(2): a wrong command line."""
    start = time.monotonic()
    args = parse_arguments(argv)
    words = shlex.join(["tools/language_models.py", *(sys.argv[1:] if argv is None else argv)])
    work = lambda: language_models(args, start + args.time_limit, words)  # noqa: E731
    return run_command("language_models.py", work, ValueError, CorpusError, RunFailed)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Every model with every rate and seed. Raises ValueError for settings that do not fit together."""
    names = [name for chosen in args.models for name in SETS.get(chosen, (chosen,))]
    shape = Shape(**{field.name: getattr(args, field.name) for field in fields(Shape)})
    common = {f.name: getattr(args, f.name) for f in fields(Training) if f.name not in ("rate", "seed")}
    return [
        make_job(name, shape, Training(**common, rate=rate, seed=seed))
        for seed in args.seeds
        for rate in args.rates
        for name in dict.fromkeys(names)
    ]


def language_models(args: argparse.Namespace, deadline: float, words: str) -> None:
    """Prepares the corpus, trains and measures until the deadline, on the clock of ``time.monotonic``, and reports.

    Raises ValueError for settings that do not fit together, CorpusError for text that cannot be used, RunFailed.
    """
    jobs = jobs_of(args)
    devices = grouped(find_devices(args.device), args.gpus)
    args.output.mkdir(parents=True, exist_ok=True)
    place = Place(
        args.output, (args.data / "training", args.data / "held_out"), args.data / "tokenizer", devices, deadline,
        args.measure_seconds,
    )  # fmt: skip
    with ThreadPoolExecutor(1) as background:  # the GPUs are free while the corpus is made
        speeds = background.submit(known_speeds, args, jobs, place) if args.fit_time else None
        facts = prepare_corpus(args)
    if args.corpus_only:
        return
    failed = []
    if speeds is not None:
        jobs, failed = fitted(args, jobs, speeds.result(), len(devices), deadline - time.monotonic())
    commit = args.commit or records.commit_of(Path(__file__).parents[2])
    origin = records.origin(torch.device("cpu" if devices[0] is None else "cuda"), commit, words)
    with ThreadPoolExecutor(1) as background:
        windows = background.submit(cut, args, facts)

        def finish(wanted: list[Job]) -> tuple[list[Job], list[Job]]:
            left = [job for job in wanted if not is_finished(job, args.output, facts["digest"])]
            say(f"{len(wanted)} models, {len(wanted) - len(left)} of them finished before")
            return run_all(left, place, windows, facts, origin, say)

        failures, late = finish(jobs)
        if args.equal_time and not late:
            longer = equal_time(jobs, args.equal_time, args.output, facts["digest"])
            more_failures, late = finish(longer)
            failures += more_failures
    failed += failures
    text, written = write_report(args.output, say)
    say("\n" + text + "\n".join(map(str, written)))
    if late:
        say(f"{len(late)} models are still to be finished: the same command goes on with them")
    if failed:
        raise RunFailed(f"{len(failed)} models failed: {', '.join(job.key for job in failed)}")


def known_speeds(args: argparse.Namespace, jobs: Sequence[Job], place: Place) -> dict[Job, float | None]:
    """What `fit.rehearse` finds; nothing where an earlier run has chosen the tokens."""
    if (args.output / FITTED).is_file():
        return {}
    return fit.rehearse(jobs, place, lengths_of(args), say)


def fitted(
    args: argparse.Namespace, jobs: Sequence[Job], speeds: dict[Job, float | None], devices: int, seconds: float
) -> tuple[list[Job], list[Job]]:
    """The jobs with as many tokens as all of them can be trained on in the time: the first run of an output folder
    decides. The second list has the jobs whose rehearsal failed, which the first one leaves out.

    Raises RunFailed where every rehearsal failed, ValueError where the time is too short.
    """
    path = args.output / FITTED
    failed = [job for job, speed in speeds.items() if speed is None]
    running = [job for job in jobs if job not in failed]
    if path.is_file():
        tokens = json.loads(path.read_text())["tokens"]
    else:
        found = {job: speed for job, speed in speeds.items() if speed}
        if not found:
            raise RunFailed(f"none of {', '.join(job.name for job in speeds)} runs here, see above")
        tokens = fit.fit_tokens(running, found, devices, seconds, args.measure_seconds)
        values = {"tokens": tokens, "speeds": {job.name: speed for job, speed in found.items()}}
        with replaced_file(path) as partial:
            partial.write_text(json.dumps(values) + "\n")
    say(f"every model is trained on {tokens:,} tokens, of {args.tokens:,} at most")
    return [replace(job, training=replace(job.training, tokens=tokens)) for job in running], failed


def lengths_of(args: argparse.Namespace) -> tuple[int, int]:
    """Lengths at which the models are measured: the training length, and --longest of it."""
    return args.length, args.length * args.longest


def equal_time(jobs: Sequence[Job], slowest: str, output: Path, digest: str) -> list[Job]:
    """The finished jobs that are faster than the model ``slowest``, with as many more tokens as make the time equal."""
    rows = {job: row for job in jobs if (row := tables.find(output, job, digest)) is not None}
    longer = []
    for job, row in rows.items():
        same = [other for other in rows if other.name == slowest and other.training == job.training]
        if not same or job.name == slowest:
            continue
        ratio = float(row["tokens_per_second"]) / float(rows[same[0]]["tokens_per_second"])
        tokens = round(ratio * job.training.tokens / fit.UNIT) * fit.UNIT or job.training.tokens
        if tokens > job.training.tokens:
            longer.append(replace(job, training=replace(job.training, tokens=tokens)))
    return longer


def cut(args: argparse.Namespace, facts: dict) -> list[held_out.HeldOut]:
    """The windows of the held-out text, of the training length and of --longest training lengths."""
    tokens = [held_out.token_file(args.data / side, facts["sides"][side]) for side in (texts.TRAINING, texts.HELD_OUT)]
    return held_out.prepare(args.data, *tokens, args.data / "tokenizer", lengths_of(args), args.held_out_tokens)


def prepare_corpus(args: argparse.Namespace) -> dict:
    """Gathers the texts, trains the tokenizer and writes Megatron's files, where ``args.data`` has none yet.

    Returns the facts of CORPUS: digest, tokens of the training text, sides, held-out packages.
    """
    path = args.data / CORPUS
    settings = {"max_bytes": args.max_bytes, "held_out_share": args.held_out_share, "vocabulary": args.vocabulary}
    if path.is_file():
        facts = json.loads(path.read_text())
        if facts["settings"] != settings:
            raise ValueError(f"{path} was made with {facts['settings']}, not {settings}: give another --data folder")
        return facts
    start = time.monotonic()
    args.data.mkdir(parents=True, exist_ok=True)
    found = texts.find_texts(texts.roots())
    taken = texts.limited(found, args.max_bytes)
    packages = texts.held_out_packages(taken, args.held_out_share)
    sides = texts.gather(taken, packages, args.data)
    say(f"{sum(side.files for side in sides.values())} files of {len(found)} in {time.monotonic() - start:.0f} s")
    facts = {"settings": settings, "files_found": len(found), "files_read": len(taken), "sides": {}}
    for name, side in sides.items():
        words = ["--input", side.path, "--output", args.data / name, "--overwrite", "--max-bad-lines", 0]
        tokenizer = args.data / "tokenizer"
        if name == texts.TRAINING:
            words += ["--train-tokenizer", args.vocabulary, "--tokenizer-output", tokenizer]
            words += ["--tokenizer-bytes", 1 << 24]
        else:
            words += ["--tokenizer", tokenizer]
        written = preprocess_data.preprocess(preprocess_data.parse_arguments(list(map(str, words))))
        facts["sides"][name] = {"files": side.files, "digest": side.digest, **written["datasets"]["all"]}
        facts["vocabulary"] = written["vocab_size"]
    digests = [facts["sides"][name]["digest"] for name in sides] + [str(args.vocabulary)]
    facts["digest"] = texts.digest_of(digests)
    facts["tokens"] = facts["sides"][texts.TRAINING]["tokens"]
    facts["held_out_packages"] = sorted(packages)
    facts["packages"] = len({text.package for text in taken})
    facts["seconds"] = round(time.monotonic() - start, 1)
    with replaced_file(path) as partial:
        partial.write_text(json.dumps(facts, indent=2) + "\n")
    say(f"{path}: {facts['tokens']:,} tokens to train on, {facts['seconds']:.0f} s")
    return facts


def find_devices(kind: str) -> tuple[int | None, ...]:
    """Numbers of all GPUs, or None for every run at a time on the CPU. Raises ValueError where there is no GPU."""
    if kind == "cpu":
        return (None,) * min(RUNS_ON_CPU, os.cpu_count() or 1)
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: there is no GPU that PyTorch can use")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        return tuple(int(number) for number in visible.split(","))
    return tuple(range(torch.cuda.device_count()))


def grouped(devices: tuple[int | None, ...], size: int) -> tuple[Device, ...]:
    """Groups of GPUs that train a model together, as "0,1". Raises ValueError where there are fewer GPUs."""
    if size == 1:
        return devices
    if None in devices or len(devices) < size:
        raise ValueError(f"--gpus {size}: there are {0 if None in devices else len(devices)} GPUs")
    return tuple(",".join(map(str, devices[i : i + size])) for i in range(0, len(devices) - size + 1, size))


def say(line: str) -> None:
    print(line, flush=True)
