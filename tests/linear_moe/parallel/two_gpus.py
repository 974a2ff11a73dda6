"""Trains a small model on two GPUs in every way that needs two, and compares losses and gradient norms with one GPU's.

    python tests/linear_moe/parallel/two_gpus.py --logs FOLDER --csv FILE [--only WORD] [--at-once 5] [--timeout 150]

Prints a line a case and writes the lines to the CSV file. Of every run that fails, the logs folder has the output. A
case that fails does not stop the others. The exit status is the number of cases that failed. On a machine without a GPU
the same cases run over gloo, without the cases that need a GPU.

Every case starts from the weights of one GPU. Its losses must fall, and must be those of one GPU within TOLERANCE, in
every step; its first gradient norm must be that of one GPU within NORM_TOLERANCE. Both are relative, and allow for sums
in bf16 in another order. A large --adam-eps makes steps proportional to gradients: with Adam's usual epsilon a rounded
gradient near zero changes a weight by a whole step, and losses of right runs drift apart. A resumed run must print the
losses of the run that was not interrupted within RESUMED.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from two_gpus_cases import BASES, CASES, DOCUMENTS, MODEL, STEPS, Case

ROOT = Path(__file__).parents[3]
TOLERANCE, NORM_TOLERANCE, RESUMED = 1e-2, 2e-2, 1e-3
SAVED = 3
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Run:
    """What a run recorded, and why it failed; "" for a run that did not."""

    losses: dict[int, float]
    norms: dict[int, float]
    seconds: float
    failure: str = ""


class Trainer:
    """Starts training runs, each with a folder of its own below ``logs``.

    Attributes:
        documents: the prefix of the data set that DOCUMENTS stands for.
    """

    def __init__(self, logs: Path, gpus: int, timeout: float):
        self.logs, self.gpus, self.timeout = logs, gpus, timeout
        self.started, self.documents = 0, logs / "documents"

    def write_documents(self) -> None:
        command = [sys.executable, "-W", "ignore", __file__, "--documents", str(self.documents)]
        subprocess.run(command, env=ENVIRONMENT, check=True)

    def train(self, name: str, ranks: int, arguments: list[str], environment: dict[str, str] | None = None) -> Run:
        """Trains with the model's and these arguments. The run's output is ``logs/name.txt``."""
        started = time.monotonic()
        record, log = self.logs / f"{name}.json", self.logs / f"{name}.txt"
        record.unlink(missing_ok=True)
        command = [sys.executable, "-W", "ignore"]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        # An index of its own for every run: runs at a time would write the same file.
        index = ["--data-cache-path", str(self.logs / f"index of {name}")]
        data = index if DOCUMENTS in arguments else ["--mock-data"]
        arguments = [str(self.documents) if word == DOCUMENTS else word for word in arguments]
        command += [__file__, "--worker", str(record), *MODEL, *data, *arguments]
        changed = ENVIRONMENT | {"MOM_TRACEBACK": "1", "MOM_VERBOSE": "1"} | (environment or {})
        if ranks == 1 and self.gpus:
            self.started += 1
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(self.gpus)))
            changed["CUDA_VISIBLE_DEVICES"] = visible.split(",")[self.started % self.gpus]
        with log.open("w") as output:
            print(*command, file=output, flush=True)
            process = subprocess.Popen(
                command, cwd=ROOT, env=changed, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                status = f"no end after {self.timeout:.0f} s"
            finally:
                with_all_ranks_ended(process)
        found = json.loads(record.read_text()) if record.exists() else {"losses": {}, "norms": {}}
        losses, norms = ({int(step): number for step, number in found[key].items()} for key in ("losses", "norms"))
        failure = "" if status == 0 and losses else f"exit {status}: {last_error(log)}"
        if not failure:
            log.unlink()
        return Run(losses, norms, time.monotonic() - started, failure)


def with_all_ranks_ended(process: subprocess.Popen) -> None:
    """Ends what is left of a run: its ranks and its checkpoint writers are in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def last_error(log: Path) -> str:
    """The first error that the output of a run names, which is the cause of those after it."""
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"(\[rank\d\]: ?)?([\w.]*(Error|Exception)|error)\b", line)]
    return (errors or lines[-1:] or ["no output"])[0][:300]


def relative(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)


def furthest(found: dict[int, float], expected: dict[int, float]) -> float:
    """The largest relative difference of a step; infinity where the steps are not the same, or a number is none."""
    if found.keys() != expected.keys() or any(math.isnan(number) for number in found.values()):
        return float("inf")
    return max((relative(found[step], expected[step]) for step in expected), default=float("inf"))


def judge(case: Case, run: Run, alone: Run) -> tuple[str, dict[str, float]]:
    """Why a run's numbers are wrong, "" where they are right, and the differences."""
    first = min(alone.norms, default=0)
    numbers = {
        "loss difference": furthest(run.losses, alone.losses),
        "norm difference": relative(run.norms[first], alone.norms[first]) if first in run.norms else float("inf"),
    }
    if not run.losses[STEPS] < run.losses[1] - 0.05:
        return f"the loss does not fall: {run.losses[1]:.4f} to {run.losses[STEPS]:.4f}", numbers
    if not case.compared:
        return "", {}
    if not numbers["loss difference"] <= TOLERANCE:
        return f"losses are not one GPU's: {steps(run.losses)} for {steps(alone.losses)}", numbers
    if not numbers["norm difference"] <= NORM_TOLERANCE:
        return f"gradient norms are not one GPU's: {steps(run.norms)} for {steps(alone.norms)}", numbers
    return "", numbers


def steps(numbers: dict[int, float]) -> str:
    return " ".join(f"{number:.4f}" for _, number in sorted(numbers.items()))


def weights_of_one(trainer: Trainer, base: str) -> Path:
    """Saves the weights that one GPU draws for a model."""
    folder = trainer.logs / f"weights of {base}"
    start = ["--bf16", "--train-iters", "1", "--lr", "0", "--save", str(folder), "--save-interval", "1"]
    run = trainer.train(f"weights of {base}", 1, [*BASES[base], *start])
    if run.failure:
        raise RuntimeError(f"one GPU, {base}: {run.failure}")
    return folder


def train_alone(trainer: Trainer, base: str, both: tuple[str, ...], weights: Path) -> Run:
    name = " ".join(["one GPU", base, *(word.strip("-") for word in both)])
    return trainer.train(name, 1, [*BASES[base], *both, *from_weights(weights), "--train-iters", str(STEPS)])


def from_weights(folder: Path) -> list[str]:
    return ["--load", str(folder), "--finetune", "--no-load-optim", "--no-load-rng"]


def run_case(trainer: Trainer, case: Case, weights: Path, alone: Future[Run]) -> dict[str, object]:
    """Trains a case and judges the result beside the run on one GPU. Returns a row of the table."""
    row: dict[str, object] = {"case": case.name, "arguments": " ".join(case.arguments)}
    folder = trainer.logs / f"checkpoints of {case.name}"
    arguments = [*BASES[case.base], *case.both, *case.arguments, "--train-iters", str(STEPS)]
    start = [] if case.own_start else from_weights(weights)
    save = ["--save", str(folder), "--save-interval", str(SAVED)] if case.resumes else []
    run = trainer.train(case.name, 2, [*arguments, *start, *save], case.environment)
    row |= {"two GPUs": steps(run.losses), "seconds": round(run.seconds)}
    if run.failure:
        return row | {"result": "failed", "why": run.failure}
    one = alone.result()
    row["one GPU"] = steps(one.losses)
    if one.failure:
        return row | {"result": "failed", "why": f"one GPU: {one.failure}"}
    why, numbers = judge(case, run, one)
    row |= {name: f"{number:.1e}" for name, number in numbers.items()}
    if why:
        return row | {"result": "wrong", "why": why}
    if case.resumes:
        load = ["--load", str(folder), "--ckpt-step", str(SAVED)]
        resumed = trainer.train(f"{case.name}, resumed", 2, [*arguments, *load], case.environment)
        row["resumed"] = steps(resumed.losses)
        if resumed.failure:
            return row | {"result": "failed", "why": f"resumed: {resumed.failure}"}
        difference = furthest(resumed.losses, {step: loss for step, loss in run.losses.items() if step > SAVED})
        row["resume difference"] = f"{difference:.1e}"
        if not difference <= RESUMED:
            return row | {"result": "wrong", "why": f"resumed: {steps(resumed.losses)} for {steps(run.losses)}"}
    return row | {"result": "right", "why": ""}


COLUMNS = (
    "case", "result", "loss difference", "norm difference", "resume difference", "seconds", "why", "one GPU",
    "two GPUs", "resumed", "arguments", "device",
)  # fmt: skip


def worker(record: str, arguments: list[str]) -> int:
    """One rank of a run: trains, and the last rank writes what was recorded."""
    from training import muon_of_torch, record_steps

    from linear_moe import pretrain
    from linear_moe.entry.machine import prepare_machine

    prepare_machine()
    losses, norms = record_steps()
    if "muon" in arguments and importlib.util.find_spec("emerging_optimizers") is None:
        muon_of_torch()
    sys.argv = ["pretrain", *arguments]
    status = pretrain.run()
    if status == 0 and losses and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
        Path(record).write_text(json.dumps({"losses": losses, "norms": norms}))
    return status


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--documents"]:
        from training import write_documents

        write_documents(Path(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, required=True, help="folder for the output of runs and for checkpoints")
    parser.add_argument("--csv", type=Path, required=True, help="file for the table")
    parser.add_argument("--only", action="append", help="cases whose name has this text; may be given several times")
    parser.add_argument("--at-once", type=int, default=5, help="runs at a time")
    parser.add_argument("--timeout", type=float, default=150, help="seconds after which a run has failed")
    options = parser.parse_args()
    options.logs.mkdir(parents=True, exist_ok=True)

    import torch

    gpus = torch.cuda.device_count()
    if gpus == 1:
        parser.error("this machine has one GPU: two are needed, or none")
    device = torch.cuda.get_device_name() if gpus else "CPU"
    cases = [case for case in CASES if not options.only or any(word in case.name for word in options.only)]
    trainer, rows = Trainer(options.logs.resolve(), min(gpus, 2), options.timeout), []
    if any(DOCUMENTS in BASES[case.base] for case in cases):
        trainer.write_documents()
    with ThreadPoolExecutor(options.at_once) as pool:
        here = [case for case in cases if gpus or not case.gpu]
        weights = {base: pool.submit(weights_of_one, trainer, base) for base in dict.fromkeys(c.base for c in here)}
        alone = {
            key: pool.submit(lambda base, both: train_alone(trainer, base, both, weights[base].result()), *key)
            for key in dict.fromkeys((case.base, case.both) for case in here)
        }

        def finish(case: Case) -> dict[str, object]:
            if not gpus and case.gpu:
                return {"case": case.name, "result": "not run", "why": f"needs a GPU: {case.gpu}"}
            try:
                return run_case(trainer, case, weights[case.base].result(), alone[case.base, case.both])
            except Exception as error:
                return {"case": case.name, "result": "failed", "why": f"{type(error).__name__}: {error}"}

        for done in as_completed([pool.submit(finish, case) for case in cases]):
            row = done.result() | {"device": device}
            rows.append(row)
            differences = [f"{name} {row[name]}" for name in COLUMNS[2:5] if name in row]
            print(f"{row['result']:8} {row['case']}: {', '.join(filter(None, [*differences, row['why']]))}", flush=True)
            rows.sort(key=lambda row: [case.name for case in cases].index(row["case"]))
            with options.csv.open("w", newline="") as file:  # after every case: a stopped command keeps its rows
                table = csv.DictWriter(file, COLUMNS)
                table.writeheader()
                table.writerows(rows)
    failed = sum(row["result"] in ("failed", "wrong") for row in rows)
    print(f"{sum(row['result'] == 'right' for row in rows)} right, {failed} not; output of failures: {trainer.logs}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
