"""Says what is installed for this Python, which devices there are, and what works with them.

    linear-moe doctor
    linear-moe doctor --kernels

With --kernels every GPU kernel runs, and is compared with plain PyTorch in float64, within two minutes.
Exit status: 0 where training can work, 1 where it cannot or a kernel is wrong, 2 where --kernels finds no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from linear_moe.commands import run_command
from linear_moe.commands.command_line import command_parser

# Nothing here imports torch or Megatron before it has been found, so that an interpreter without them gets an answer.
FOUND, MISSING, TOO_OLD, UNTESTED, BROKEN = "found", "missing", "too old", "untested", "broken"
INSTALL = "pip install 'linear-moe[train]'"
PYTHON = (3, 12)
MEGATRON_SERIES = ((0, 18), (0, 19))
VERSION_PART = re.compile(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE)\s*=\s*['\"]?(\w*)['\"]?", re.MULTILINE)


@dataclass(frozen=True)
class Package:
    """A package that a line is about.

    Attributes:
        name: for people.
        module: what Python imports.
        distributions: names under which the package is installed.
        least: the oldest version that works.
        works: what works with the package.
        without: what happens without.
        needed: whether training cannot work without.
    """

    name: str
    module: str
    distributions: tuple[str, ...]
    least: tuple[int, ...]
    works: str
    without: str
    needed: bool = False


PACKAGES = (
    Package("torch", "torch", ("torch",), (2, 9), "layers, training", f"nothing works: {INSTALL}", True),
    Package("NumPy", "numpy", ("numpy",), (1, 26), "data files", f"no training: {INSTALL}", True),
    Package("PyYAML", "yaml", ("pyyaml",), (6,), "settings in files", f"no training: {INSTALL}", True),
    Package("Triton", "triton", ("triton", "pytorch-triton", "triton-nv"), (3, 5), "the GPU kernels",
            "layers compute in PyTorch, slowly: pip install triton"),
    Package("Transformer Engine", "transformer_engine", ("transformer_engine", "transformer-engine"), (2, 0),
            "Megatron's fused layers, FP8, context parallelism of softmax layers",
            "--transformer-impl local: Megatron's layers in plain PyTorch; no FP8"),
    Package("Apex", "fused_weight_gradient_mlp_cuda", ("apex",), (), "gradient accumulation fusion",
            "weight gradients are added in an operation of their own"),
    Package("transformers", "transformers", ("transformers",), (4, 57), "Hugging Face models, tokenizers, exports",
            "no export, no Hugging Face tokenizer: pip install 'linear-moe[hf]'"),
    Package("TensorBoard", "tensorboard", ("tensorboard",), (2, 16), "--tensorboard-dir, pictures of a run",
            "no --tensorboard-dir: pip install tensorboard"),
    Package("wandb", "wandb", ("wandb",), (), "--wandb-project", "no --wandb-project: pip install wandb"),
    Package("flash-linear-attention", "fla", ("flash-linear-attention",), (), "a peer for the timing tools",
            "the timing tools leave their peer out"),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """A line of the answer.

    Attributes:
        state: FOUND, MISSING, TOO_OLD, UNTESTED or BROKEN.
        name: of the package or device.
        version: or a place, or a name.
        about: what works then, or what to do.
        stops: whether training cannot work.
    """

    state: str
    name: str
    version: str
    about: str
    stops: bool = False

    def __str__(self) -> str:
        return f"{self.state:8}  {self.name:22}  {self.version:30}  {self.about}".rstrip()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status that the module's docstring describes."""
    args = parse_arguments(argv)
    status = []

    def work():
        status.append(examine(quiet=args.quiet))
        if args.kernels:
            status.append(check_kernels())

    return run_command("doctor", work) or max(status)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--kernels", action="store_true", help="also run every GPU kernel, and time it")
    parser.add_argument(
        "--quiet", action="store_true", help="print only what keeps training from working; PyTorch is not imported"
    )
    return parser.parse_args(argv)


def examine(quiet: bool = False) -> int:
    """Prints the findings. Returns 0 where training can work and 1 where it cannot."""
    findings = [python(), *map(package, PACKAGES), megatron()]
    if not quiet:
        findings += [*compilers(), *devices(findings)]
    stops = [finding for finding in findings if finding.stops]
    if quiet:
        if stops:
            print(f"error: {sys.executable} cannot train:", *stops, sep="\n", file=sys.stderr)
            print("linear-moe doctor (python -m linear_moe.cli doctor) lists everything", file=sys.stderr)
        return int(bool(stops))
    print(sys.executable, *findings, "", sep="\n")
    if [(stop.state, stop.name) for stop in stops] == [(MISSING, "megatron-core")]:
        script = "path/to/Megatron-LM/pretrain_gpt.py"
        print(f"training can work with a clone of Megatron-LM alone: python -m linear_moe {script}")
    elif stops:
        print(f"training cannot work: {', '.join(f'{stop.name} is {stop.state}' for stop in stops)}")
    else:
        print("training can work")
    return int(bool(stops))


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (2, 10, 0) of 2.10.0a0+nv."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def python() -> Finding:
    """The interpreter itself."""
    version, old = ".".join(map(str, sys.version_info[:3])), sys.version_info < PYTHON
    about = "Python 3.12 or newer is needed" if old else ""
    return Finding(TOO_OLD if old else FOUND, "Python", version, about, stops=old)


def package(about: Package) -> Finding:
    """Whether a package is here and new enough. Imports nothing."""
    try:
        present = find_spec(about.module) is not None
    except (ImportError, ValueError):
        present = False
    if not present:
        return Finding(MISSING, about.name, "", about.without, about.needed)
    version = installed_version(about.distributions)
    if version and about.least and numbers(version) < about.least:
        least = ".".join(map(str, about.least))
        return Finding(TOO_OLD, about.name, version, f"{least} or newer is needed; {about.without}", about.needed)
    return Finding(FOUND, about.name, version or "unknown version", about.works)


def installed_version(distributions: Sequence[str]) -> str:
    """The version of the first distribution that is installed; empty where none is."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return ""


def megatron() -> Finding:
    """The Megatron that this Python imports, the package's or a clone's, without importing it."""
    without = (
        f"no training: {INSTALL}, or a clone of Megatron-LM on PYTHONPATH; python -m linear_moe SCRIPT takes the clone "
        "that the script lies in"
    )
    spec = find_spec("megatron")
    places = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    core = next((place / "core" for place in places if (place / "core/package_info.py").is_file()), None)
    if core is None:
        return Finding(MISSING, "megatron-core", "", without, stops=True)
    parts = dict(VERSION_PART.findall((core / "package_info.py").read_text()))
    version = ".".join(parts.get(name, "0") for name in ("MAJOR", "MINOR", "PATCH")) + parts.get("PRE_RELEASE", "")
    series = numbers(version)[:2]
    if series < MEGATRON_SERIES[0]:
        return Finding(TOO_OLD, "megatron-core", version, "0.18 and 0.19 work", stops=True)
    if not any((place / "training").is_dir() for place in places):
        about = f"{core.parent} has no megatron.training: {INSTALL}, or a whole clone of Megatron-LM"
        return Finding(BROKEN, "megatron-core", version, about, stops=True)
    if series not in MEGATRON_SERIES:
        about = "0.18 and 0.19 were tried; a patch that does not fit stops the run"
        return Finding(UNTESTED, "megatron-core", version, about)
    return Finding(FOUND, "megatron-core", version, f"training; {core.parent}")


def compilers() -> list[Finding]:
    """What Triton calls to compile a kernel: ptxas, a C compiler, and Python's headers."""
    if find_spec("triton") is None:
        return []
    found = []
    ptxas = ptxas_path()
    about = "assembles the GPU kernels" if ptxas else "no GPU kernel compiles: give TRITON_PTXAS_PATH, or install CUDA"
    found.append(Finding(FOUND if ptxas else MISSING, "ptxas", ptxas_version(ptxas) if ptxas else "", about))
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    about = "builds Triton's launchers" if compiler else "no GPU kernel starts: install gcc, or name a compiler in CC"
    found.append(Finding(FOUND if compiler else MISSING, "C compiler", compiler or "", about))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if header.is_file():
        found.append(Finding(FOUND, "Python.h", "", "for Triton's launchers"))
    else:
        about = f"no GPU kernel starts: {header.parent} has no headers; install python3-dev"
        found.append(Finding(MISSING, "Python.h", "", about))
    return found


def ptxas_path() -> str | None:
    """The assembler that Triton takes: the one that the environment names, its own, or the one on PATH."""
    named = os.environ.get("TRITON_PTXAS_PATH")
    if named:
        return named if Path(named).is_file() else None
    for place in find_spec("triton").submodule_search_locations or []:
        own = Path(place) / "backends/nvidia/bin/ptxas"
        if own.is_file():
            return str(own)
    return shutil.which("ptxas")


def ptxas_version(path: str) -> str:
    """As ptxas itself says; its path where it does not."""
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return path
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return found[1] if found else path


def devices(findings: Sequence[Finding]) -> list[Finding]:
    """The CUDA devices, with the kernels that each gets; imports torch where that is installed."""
    if any(finding.name == "torch" and finding.state != FOUND for finding in findings):
        return []
    try:
        import torch
    except Exception as error:  # a library that is missing, or built for another one
        words = " ".join(str(error).split())[:200]
        return [Finding(BROKEN, "torch", "", f"cannot be imported: {words}", stops=True)]
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        why = "no driver or no device" if built else "this PyTorch is built without CUDA"
        return [Finding(MISSING, "CUDA device", "", f"{why}: training runs on the CPU, slowly")]
    return [device(torch, number) for number in range(torch.cuda.device_count())]


def device(torch, number: int) -> Finding:
    """One device, and the kernels of the paper's head size there."""
    about = torch.cuda.get_device_properties(number)
    version = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, sm_{about.major}{about.minor}"
    if torch.version.hip is not None:
        return Finding(UNTESTED, f"device {number}", about.name, "kernels on AMD were never run: --mom-kernels torch")
    if find_spec("triton") is None:
        return Finding(FOUND, f"device {number}", version, "layers in PyTorch, because Triton is missing")
    return Finding(FOUND, f"device {number}", version, kernels_of(torch.device("cuda", number), torch.bfloat16))


def kernels_of(place, dtype) -> str:
    """The kernel set that gated_deltanet gets on a device, and why a set for that chip does not run."""
    from mom_layers.common.chips import chip_of
    from mom_layers.recur.scalar_delta import kernel_sets

    problems = [
        f"; the {kernels.NAME} kernels do not run: {kernels.problem()}"
        for kernels in kernel_sets.KERNEL_SETS
        if kernels.takes(chip_of(place), dtype, 256, 256) and hasattr(kernels, "problem") and kernels.problem()
    ]
    chosen = kernel_sets.kernel_set(place, dtype, 256, 256).NAME
    return f"{chosen} kernels for heads of 256 in bfloat16{''.join(problems)}"


def check_kernels() -> int:
    """Runs the self-test. Returns its exit status; 1 where the self-test cannot be imported."""
    print(flush=True)
    try:
        from mom_layers.selftest.command import main as self_test
    except ImportError as error:
        print(f"the kernels cannot be checked: {error}", file=sys.stderr)
        return 1
    return self_test([])
