#!/usr/bin/env python
"""Trains a model of the recipe on one GPU and in layouts of two and four; compares losses, speed, memory and volume.

    python tools/bench_layouts.py --output DIR [--model 1.3b] [--layouts NAME ...] [--steps N] [--global-batch N]
    python tools/bench_layouts.py --output DIR --long [--tokens N] [--layouts NAME ...]

Each layout is a run of examples/pretrain_mom_a100.sh of its own, with the same data, seed and global batch; without
--no-profile a last step is profiled on rank 0, for the bytes that rank 0 sent. With --long a step has one sequence of
128k tokens, or of --tokens, on one GPU and over the context-parallel ranks, with full recomputation. In DIR:
layouts.csv (a row a layout), exchanges.csv (a row for each process group and collective: bytes sent in a step),
losses.csv (a row a step) and losses.png. A layout's rows are written when its run ends; a layout that fails does not
end the others. Runs that are in DIR already are not run again. Without a GPU a tiny model on two CPU processes shows
that the tool runs.
"""

import argparse
import contextlib
import csv
import gzip
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from benchmark import VERSIONS, append_csv, device_kind, versions

from linear_moe.commands.values import path as a_path
from linear_moe.commands.values import positive, whole
from linear_moe.temporary import save_figure
from linear_moe.watching.run_plots import read_scalars

ROOT = Path(__file__).parents[1]
# GPUs, and settings of the script; EXCHANGE is --mom-expert-exchange
LAYOUTS = {
    "one": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {"TP": 2, "SP": 0}),
    "TP2+SP": (2, {"TP": 2}),
    "EP2": (2, {"EP": 2}),
    "EP2 all-gather": (2, {"EP": 2, "EXCHANGE": "all-gather"}),
    "EP2 peer-memory": (2, {"EP": 2, "EXCHANGE": "peer-memory"}),
    "PP2": (2, {"PP": 2}),
    "CP2": (2, {"CP": 2}),
    "DP4": (4, {}),
    "EP4": (4, {"EP": 4}),
    "EP4 all-gather": (4, {"EP": 4, "EXCHANGE": "all-gather"}),
    "EP4 peer-memory": (4, {"EP": 4, "EXCHANGE": "peer-memory"}),
    "TP2+SP x EP2": (4, {"TP": 2, "EP": 2}),
    "TP2+SP x EP2 peer-memory": (4, {"TP": 2, "EP": 2, "EXCHANGE": "peer-memory"}),
    "TP2+SP x DP2": (4, {"TP": 2}),
    "TP4+SP": (4, {"TP": 4}),
    "PP2 x DP2": (4, {"PP": 2}),
    "PP4": (4, {"PP": 4}),
    "CP4": (4, {"CP": 4}),
}
LONG_LAYOUTS = ("one", "CP2", "CP4")
BATCHES = {  # settings of the script; micro-batches as large as the memory allows and the layout divides
    "cuda": {"GLOBAL_BATCH": 32, "MICRO_BATCH": 16},
    "cpu": {
        "GLOBAL_BATCH": 4,
        "MICRO_BATCH": 2,
        "LAYERS": 2,
        "HIDDEN": 64,
        "FFN": 128,
        "HEAD_DIM": 16,
        "VOCAB": 512,
        "ATTENTION_HEADS": 2,
    },
}
LONG_BATCHES = {
    "cuda": {"SEQ_LENGTH": 131072, "GLOBAL_BATCH": 1, "MICRO_BATCH": 1},
    "cpu": BATCHES["cpu"] | {"SEQ_LENGTH": 1024, "GLOBAL_BATCH": 1, "MICRO_BATCH": 1},
}
RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]
WARM_UP = 2  # steps that are not timed
BYTES = {"BFloat16": 2, "Half": 2, "Float": 4, "Int": 4, "Long": 8, "Byte": 1, "Bool": 1, "Double": 8}
FIELDS = (*VERSIONS, "model", "layout", "gpus", "sequence", "global_batch", "micro_batch", "steps", "tokens_per_second")
FIELDS += ("of_one", "peak_gib", "first_loss", "last_loss", "largest_difference")


def train(layout: str, folder: Path, steps: int, device: str, options: argparse.Namespace) -> None:
    """Runs the script for one layout; its output goes to ``folder/output.txt``. Raises CalledProcessError."""
    gpus, settings = LAYOUTS[layout]
    settings = {"TP": 1} | (LONG_BATCHES if options.long else BATCHES)[device] | settings
    if options.global_batch is not None:
        settings["GLOBAL_BATCH"] = options.global_batch
    if options.long and options.tokens is not None:
        settings["SEQ_LENGTH"] = options.tokens
    if "PP" in settings and device == "cuda":
        settings["MICRO_BATCH"] = 8  # stages idle less over more micro-batches
    if options.micro_batch is not None:
        settings["MICRO_BATCH"] = options.micro_batch
    elif options.model != "380m" and not options.long:
        del settings["MICRO_BATCH"]  # the script chooses what fits
    exchange = settings.pop("EXCHANGE", "auto")
    arguments = ["--eval-iters", "0", "--log-memory-to-tensorboard", *(RECOMPUTE if options.long else [])]
    arguments += ["--mom-expert-exchange", exchange]
    all_steps = steps if options.no_profile else steps + 1
    if device == "cuda" and not options.no_profile:
        arguments += ["--profile", "--use-pytorch-profiler", "--profile-step-start", str(steps)]
        arguments += ["--profile-step-end", str(all_steps)]
    environment = os.environ | {name: str(value) for name, value in settings.items()}
    environment |= {
        "MODEL": options.model,
        "OUT": str(folder),
        "CHECKPOINTS": "",
        "TRAIN_ITERS": str(all_steps),
        "LOG_INTERVAL": "1",
    }
    environment |= {"EVAL_INTERVAL": str(10 * all_steps), "MOM_PYTHON": sys.executable}
    environment["GPUS" if device == "cuda" else "PROCESSES"] = str(gpus)
    if device == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:gpus])
    folder.mkdir(parents=True, exist_ok=True)
    command = ["bash", str(ROOT / "examples" / "pretrain_mom_a100.sh"), *arguments]
    with (folder / "output.txt").open("w") as log:
        output = {"stdout": log, "stderr": subprocess.STDOUT}
        with subprocess.Popen(command, env=environment, start_new_session=True, **output) as run:
            try:
                status = run.wait(options.timeout)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(run.pid, signal.SIGKILL)  # its ranks too
    if status:
        raise subprocess.CalledProcessError(status, command)
    shown = (folder / "output.txt").read_text()
    chosen = re.findall(r"^  (SEQ_LENGTH|MICRO_BATCH|RECOMPUTE)=(\d+)$", shown, re.MULTILINE)
    settings |= {"MODEL": options.model, "STEPS": steps} | {name: int(value) for name, value in chosen}
    (folder / "settings.json").write_text(json.dumps(settings))


def sent_bytes(trace: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """{(process group, collective): (calls, bytes that rank 0 sent)} of a profiler's trace.

    Counted as rings send: an all-gather its part to all others, a reduce-scatter all parts but its own, an all-reduce
    both; an all-to-all an equal share to each rank.
    """
    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    calls, sent = Counter(), Counter()
    for event in events:
        about = event.get("args", {})
        ranks, name = about.get("Group size", 1), about.get("Collective name")
        if event.get("cat") != "kernel" or name is None or ranks < 2:
            continue
        size = BYTES[about["dtype"]] * about["In msg nelems"]
        others = ranks - 1
        if "all_gather" in name or "allgather" in name:
            volume = size * others
        elif "reduce_scatter" in name or "all_to_all" in name:
            volume = size * others / ranks
        elif "allreduce" in name:
            volume = 2 * size * others / ranks
        elif "recv" in name:
            volume = 0
        else:  # send, broadcast
            volume = size
        group = about.get("Process Group Description") or about.get("Process Group Name", "")
        calls[group, name] += 1
        sent[group, name] += int(volume)
    return {key: (calls[key], sent[key]) for key in sorted(calls)}


def result(folder: Path, warm_up: int) -> dict:
    """Losses by step, median tokens a second and peak memory of a finished run.

    Raises ValueError where the folder's files do not hold a step after the warm-up.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text())
        scalars = read_scalars(folder / "tensorboard")
        settings.setdefault("STEPS", max(scalars["lm loss"]) - 1)  # of older runs, whose last step is the profiled one
        losses = {step: value for step, value in scalars["lm loss"].items() if step <= settings["STEPS"]}
        speeds = scalars["tokens-per-second"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: no result of a run: {error}; delete the folder to run the layout again") from error
    speeds = [value for step, value in speeds.items() if warm_up < step <= settings["STEPS"]]
    if not speeds or not losses:
        raise ValueError(f"{folder}: no step after the first {warm_up}; delete the folder to run the layout again")
    return {
        "settings": settings,
        "losses": losses,
        "tokens_per_second": statistics.median(speeds),
        "peak_gib": max(scalars.get("mem-max-allocated-bytes", {0: 0}).values()) / 2**30,
    }


def row_of(layout: str, run: dict, one: dict | None, about: dict[str, str]) -> dict:
    """A line of layouts.csv."""
    losses, settings = run["losses"], run["settings"]
    row = about | {"model": settings["MODEL"], "layout": layout, "gpus": LAYOUTS[layout][0]}
    row["sequence"] = settings["SEQ_LENGTH"]
    row |= {"global_batch": settings["GLOBAL_BATCH"], "micro_batch": settings["MICRO_BATCH"], "steps": len(losses)}
    row |= {"tokens_per_second": f"{run['tokens_per_second']:.0f}", "peak_gib": f"{run['peak_gib']:.2f}"}
    row |= {"first_loss": f"{losses[min(losses)]:.4f}", "last_loss": f"{losses[max(losses)]:.4f}"}
    row |= {"of_one": "", "largest_difference": ""}
    if one is not None:
        steps = losses.keys() & one["losses"].keys()
        difference = max(abs(losses[s] / one["losses"][s] - 1) for s in steps)
        row["of_one"] = f"{run['tokens_per_second'] / one['tokens_per_second']:.2f}"
        row["largest_difference"] = f"{difference:.4f}"
    return {name: row[name] for name in FIELDS}


def draw(path: Path, runs: dict[str, dict], title: str) -> None:
    """The losses of all layouts over the steps, and what parts them from one GPU's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 8), height_ratios=(2, 1), sharex=True, layout="constrained")
    one = runs.get("one", {}).get("losses", {})
    for index, (layout, run) in enumerate(runs.items()):
        steps, losses = zip(*run["losses"].items(), strict=True)
        width = 5 - 4 * index / len(runs)  # lines that coincide show beside each other
        upper.plot(steps, losses, color=f"C{index}", linewidth=width, label=layout)
        both = [step for step in steps if step in one]
        if layout != "one" and both:
            apart = [100 * (run["losses"][step] / one[step] - 1) for step in both]
            lower.plot(both, apart, color=f"C{index}", label=layout)
    upper.set(ylabel="loss, nats per token", title=title)
    lower.set(xlabel="training step", ylabel="apart from one GPU, %")
    for axis in (upper, lower):
        axis.grid(alpha=0.3)
    upper.legend(ncols=2)
    save_figure(figure, path, dpi=120)
    plt.close(figure)


def possible_layouts(device: str, long: bool) -> tuple[str, ...]:
    """The layouts that this machine has GPUs for; without a GPU those of two processes that need none."""
    gpus = torch.cuda.device_count() if device == "cuda" else 2
    names = (name for name, (count, _) in LAYOUTS.items() if count <= gpus and (not long or name in LONG_LAYOUTS))
    return tuple(name for name in names if device == "cuda" or "peer-memory" not in name)


def parse(argv=None) -> argparse.Namespace:
    """The command line's options; `steps` is never None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=a_path, required=True, help="folder of the runs and tables")
    parser.add_argument("--model", choices=("380m", "1.3b", "7b"), default="380m", help="380m if left out")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, help="all that the machine has GPUs for, if left out")
    parser.add_argument("--steps", type=whole(1), help="training steps of a run; 50, or 8 with --long")
    parser.add_argument("--long", action="store_true", help="one sequence of 128k tokens")
    parser.add_argument("--tokens", type=whole(1), metavar="N", help="of the sequence of --long; 131072")
    parser.add_argument("--micro-batch", type=whole(1), metavar="N", help="sequences a GPU computes at once")
    parser.add_argument("--global-batch", type=whole(1), metavar="N", help="sequences a step; 32, the recipe has 256")
    parser.add_argument("--no-profile", action="store_true", help="time only, for runs of few steps")
    parser.add_argument("--timeout", type=positive, default=300, metavar="S", help="seconds a run may take")
    options = parser.parse_args(argv)
    options.steps = options.steps or (8 if options.long else 50)
    if options.steps <= WARM_UP:
        parser.error(f"--steps {options.steps}: the first {WARM_UP} are not timed, take more")
    return options


def write_rows(layout: str, runs: dict[str, dict], output: Path, about: dict[str, str]) -> None:
    """Appends the rows of a layout that has ended to the tables, and prints them."""
    row = row_of(layout, runs[layout], runs.get("one"), about)
    append_csv(output / "layouts.csv", [row])
    shown = ("layout", "tokens_per_second", "of_one", "peak_gib", "first_loss", "last_loss", "largest_difference")
    print(*(f"{name} {row[name]}" for name in shown), flush=True)
    for trace in (output / layout / "torch_profile").glob("rank-0.json.gz"):
        for (group, collective), (calls, sent) in sent_bytes(trace).items():
            exchange = {"layout": layout, "group": group, "collective": collective, "calls": calls, "bytes": sent}
            append_csv(output / "exchanges.csv", [exchange])
            print("   ", *exchange.values(), flush=True)


def write_losses(runs: dict[str, dict], output: Path, title: str) -> None:
    """The losses of all layouts, as a table and a picture."""
    steps = sorted(set().union(*(run["losses"] for run in runs.values())))
    with (output / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *runs])
        for step in steps:
            writer.writerow([step, *(f"{run['losses'].get(step, float('nan')):.5f}" for run in runs.values())])
    draw(output / "losses.png", runs, title)


def main(argv=None) -> int:
    options = parse(argv)
    device, about = device_kind(), versions()
    names = options.layouts or possible_layouts(device, options.long)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in ("layouts.csv", "exchanges.csv", "losses.csv"):
        (options.output / name).unlink(missing_ok=True)
    runs, failed = {}, []
    for layout in names:
        folder, start = options.output / layout, time.monotonic()
        try:
            if not (folder / "settings.json").exists():
                try:
                    train(layout, folder, options.steps, device, options)
                finally:
                    print(f"{layout}: {time.monotonic() - start:.0f} s", flush=True)
            runs[layout] = result(folder, WARM_UP)
            write_rows(layout, runs, options.output, about)
        except (subprocess.SubprocessError, OSError, ValueError, KeyError, EOFError) as error:
            failed.append(layout)  # the other layouts are run all the same
            print(f"{layout}: {error}")
            if isinstance(error, subprocess.SubprocessError):
                print(f"the end of {folder / 'output.txt'}:")
                print("\n".join((folder / "output.txt").read_text(errors="replace").splitlines()[-12:]), flush=True)
    if runs:
        write_losses(runs, options.output, f"{options.model} in {len(runs)} layouts, {about['device']}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
