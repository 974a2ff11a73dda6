"""What the timing tools share: the device, medians, peak memory, rows of a CSV file, a picture."""

from __future__ import annotations

import argparse
import contextlib
import csv
import gc
import importlib.metadata
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from triton import AsyncCompileMode

from linear_moe.commands.values import path as a_path
from linear_moe.commands.values import picture, whole
from linear_moe.temporary import save_figure

VERSIONS = ("device", "torch", "triton")


def device_kind() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def versions() -> dict[str, str]:
    """The device's name and the versions that a figure depends on."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": name, "torch": torch.__version__, "triton": importlib.metadata.version("triton")}


def parse_options(
    description: str,
    argv=None,
    *,
    plot: bool = False,
    processes: bool = False,
    flags: dict[str, str] | None = None,
    choices: dict[str, tuple[tuple[str, ...], str]] | None = None,
):
    """The options of every timing tool; ``plot`` adds ``--plot``, ``processes`` adds ``--processes``, and ``flags`` are
    {name: help} of switches.

    choices: {name: (words, help)} of options that take some of the words; all words where the option is absent.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=whole(1), metavar="N", help="only the first N cases")
    parser.add_argument("--csv", type=a_path, metavar="FILE", help="append the rows to this file")
    if plot:
        parser.add_argument("--plot", type=picture, metavar="FILE", help="draw the rows in this file")
    if processes:
        parser.add_argument("--processes", type=whole(1), metavar="N", help="compile in N processes before measuring")
    for name, text in (flags or {}).items():
        parser.add_argument(name, action="store_true", help=text)
    for name, (words, text) in (choices or {}).items():
        parser.add_argument(f"--{name}", nargs="+", choices=words, default=words, metavar="NAME",
                            help=f"{text}: {', '.join(words)}")  # fmt: skip
    return parser.parse_args(argv)


def median_ms(step: Callable[[], object], device: str, repeat_ms: int = 400) -> float:
    """Median time of a call in milliseconds, after warming up; calls are repeated for about ``repeat_ms`` on a GPU."""
    if device == "cuda":
        from triton.testing import do_bench

        for _ in range(3):
            step()
        return do_bench(step, warmup=200, rep=repeat_ms, return_mode="median")
    step()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def tune_quickly() -> None:
    """From now on Triton's autotuner compiles all configurations of a kernel at once, on all cores, before it times
    them one after another, for 20 ms each and not 125. The peers have dozens a kernel, which takes minutes otherwise.
    """
    from triton.runtime.autotuner import Autotuner
    from triton.testing import do_bench

    prune_configs = Autotuner.prune_configs
    if hasattr(prune_configs, "compiles_together"):
        return

    def prune_and_compile(self, kwargs):
        self._do_bench = self._do_bench or partial(do_bench, warmup=5, rep=15)
        configs = prune_configs(self, kwargs)
        with ThreadPoolExecutor() as executor, AsyncCompileMode(executor, ignore_errors=True):
            for config in configs:  # a configuration that fails here fails again when timed, and is left out there
                with contextlib.suppress(Exception):
                    self.fn.run(**{**self.nargs, **kwargs, **config.all_kwargs(), "warmup": True})
        return configs

    prune_and_compile.compiles_together = True
    Autotuner.prune_configs = prune_and_compile


def compile_in_processes(function: Callable, jobs: list[tuple], processes: int) -> None:
    """Calls a function with each job's arguments in ``processes`` processes, so that Triton's cache has the kernels.

    The processes do not keep what the autotuner chooses, because they disturb each other's times. A job that fails is
    left out: its failure shows again where it is measured.
    """
    before = os.environ.get("TRITON_CACHE_AUTOTUNING")
    os.environ["TRITON_CACHE_AUTOTUNING"] = "0"
    try:
        with multiprocessing.get_context("spawn").Pool(processes, maxtasksperchild=1) as pool:
            for result in [pool.apply_async(function, job) for job in jobs]:
                result.wait()
    finally:
        if before is None:
            del os.environ["TRITON_CACHE_AUTOTUNING"]
        else:
            os.environ["TRITON_CACHE_AUTOTUNING"] = before


def graphed(step: Callable[[], object]) -> Callable[[], None]:
    """The same call as a CUDA graph's replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def peak_gib(step: Callable[[], object], device: str) -> float:
    """Memory that a call takes at most beyond what is allocated before it, in GiB; 0 on a CPU."""
    if device != "cuda":
        return 0.0
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def free_memory() -> None:
    """Gives back what earlier cases held, so that the next one meets an empty device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def append_csv(path: Path, rows: list[dict]) -> None:
    """Adds rows to a CSV file; a new one gets the rows' keys as its header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def plot_growth(
    path: Path,
    rows: list[dict],
    x: str,
    panels: dict[str, str],
    name: str,
    title: str,
    *,
    x_label: str = "",
    guide: bool = False,
) -> None:
    """Draws a panel for each of some quantities over x, both logarithmic, a line for every value of ``name``.

    A panel without a positive value (memory on a CPU) is left out.

    Args:
        path: of the PNG file.
        rows: dictionaries with the columns x, name and the panels'.
        panels: {column: axis label}.
        x_label: of the axis, where the column's name is not enough.
        guide: also draw, dashed, what is proportional to x and meets the first line where that ends.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {column: label for column, label in panels.items() if any(float(row[column]) > 0 for row in rows)}
    figure, (axes,) = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 5), layout="constrained", squeeze=False)
    lines = list(dict.fromkeys(row[name] for row in rows))
    ticks = sorted({int(row[x]) for row in rows})
    for axis, (column, label) in zip(axes, panels.items(), strict=True):
        end = None
        for index, line in enumerate(lines):
            points = [(float(row[x]), float(row[column])) for row in rows if row[name] == line]
            points = sorted((a, b) for a, b in points if b > 0)
            if points:
                width = 4 - 3 * index / len(lines)  # lines that coincide show beside each other
                style = {"color": f"C{index}", "linewidth": width, "marker": "o", "markersize": 4 + width}
                axis.plot(*zip(*points, strict=True), label=line, **style)
                end = end or points[-1]
        if guide:
            proportional = [end[1] / end[0] * tick for tick in ticks]
            axis.plot(ticks, proportional, "--", color="0.6", label=f"proportional to {x}", zorder=1)
        axis.set(xscale="log", yscale="log", xlabel=x_label or x, ylabel=label)
        axis.set_xticks(ticks, [f"{tick // 1024}k" if tick % 1024 == 0 else tick for tick in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(title)
    save_figure(figure, path, dpi=120)
    plt.close(figure)
