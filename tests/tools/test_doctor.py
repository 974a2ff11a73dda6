"""`linear-moe doctor`: what is found, missing, too old or broken, and whether training can work."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from linear_moe.cli import main as cli
from linear_moe.commands import doctor
from mom_layers import kernel_problems
from mom_layers.common.chips import forced
from mom_layers.recur.scalar_delta import hopper

ROOT = Path(__file__).parents[2]


def test_this_interpreter_can_train(capsys):
    assert cli(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{sys.executable}\n") and printed.endswith("training can work\n")
    lines = {line[10:32].strip(): line for line in printed.splitlines()}
    for name in ("Python", "torch", "NumPy", "PyYAML", "Triton", "transformers", "megatron-core", "ptxas"):
        assert lines[name].startswith("found"), lines[name]
    assert f"  {torch.__version__.partition('+')[0]}" in lines["torch"]
    assert {"Transformer Engine", "Apex", "TensorBoard", "wandb", "flash-linear-attention", "C compiler"} <= set(lines)
    if not torch.cuda.is_available():
        assert "training runs on the CPU" in lines["CUDA device"]


@pytest.mark.parametrize("quiet", [False, True])
def test_an_interpreter_without_packages_gets_an_answer(quiet):
    """-S leaves out every installed package."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-m", "linear_moe.cli", "doctor", *(["--quiet"] if quiet else [])]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 1
    if quiet:
        first, *rest = done.stderr.splitlines()
        assert first == f"error: {sys.executable} cannot train:" and not done.stdout
        assert [line[10:32].strip() for line in rest[:-1]] == ["torch", "NumPy", "PyYAML", "megatron-core"]
        assert "pip install 'linear-moe[train]'" in rest[0]
    else:
        assert not done.stderr
        assert done.stdout.endswith(
            "training cannot work: torch is missing, NumPy is missing, PyYAML is missing, megatron-core is missing\n"
        )


def test_the_least_triton_is_that_of_the_kernels():
    (triton,) = (package for package in doctor.PACKAGES if package.name == "Triton")
    assert triton.least == kernel_problems.OLDEST_TRITON


def test_the_script_tells_an_interpreter_without_packages_before_any_work(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {tmp_path}/as_python.py "$@"\n')
    python.chmod(0o755)
    (tmp_path / "as_python.py").write_text(AS_PYTHON.format(python=str(python), root=str(ROOT)))
    environment = {"PATH": os.environ["PATH"], "MOM_PYTHON": str(python), "OUT": str(tmp_path / "out")}
    script = ["bash", str(ROOT / "examples/pretrain_mom_a100.sh")]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"error: {python} cannot train:" in done.stderr and "missing   torch" in done.stderr
    assert not (tmp_path / "out").exists() and "settings:" not in done.stdout


# Python without installed packages that says its own name for itself, as an interpreter of an environment does.
AS_PYTHON = """
import runpy, sys
sys.executable = {python!r}
sys.path.insert(0, {root!r})
words = sys.argv[1:]
if words[0] == "-c":
    sys.argv = words
    exec(words[1])
else:
    sys.argv = words[1:]
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
"""


def package(**changes):
    sizes = {"name": "torch", "module": "torch", "distributions": ("torch",), "least": (2, 9), "works": "layers"}
    return doctor.package(doctor.Package(**(sizes | {"without": "nothing works", "needed": True} | changes)))


def test_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda names: "2.8.0+cu126")
    finding = package()
    assert (finding.state, finding.stops) == ("too old", True) and "2.9 or newer is needed" in finding.about
    monkeypatch.setattr(doctor, "installed_version", lambda names: "2.10.0a0+b4e4ee8.nv25.12")
    assert package().state == "found"
    assert package(module="no_such_module", needed=False).state == "missing"
    assert not package(module="no_such_module", needed=False).stops


def test_versions_are_compared_as_numbers():
    assert doctor.numbers("2.10.0a0+nv") == (2, 10, 0) > doctor.numbers("2.9")
    assert doctor.numbers("unknown") == ()


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """Makes a folder with a Megatron of a version, and puts the folder before the installed one."""

    def make(version, training=True):
        major, minor, patch = version.split(".")
        core = tmp_path / "megatron/core"
        core.mkdir(parents=True)
        (core / "package_info.py").write_text(
            f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = 'rc1'\n"
        )
        if training:
            (tmp_path / "megatron/training").mkdir()
        spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "megatron")])
        monkeypatch.setattr(doctor, "find_spec", lambda name: spec)
        return doctor.megatron()

    return make


@pytest.mark.parametrize(
    ("version", "state", "stops"),
    [
        ("0.17.1", "too old", True),
        ("0.18.2", "found", False),
        ("0.19.0", "found", False),
        ("0.21.0", "untested", False),
    ],
)
def test_versions_of_megatron(clone, version, state, stops):
    finding = clone(version)
    assert (finding.state, finding.version, finding.stops) == (state, f"{version}rc1", stops)


def test_megatron_without_its_training(clone):
    finding = clone("0.19.0", training=False)
    assert (finding.state, finding.stops) == ("broken", True) and "has no megatron.training" in finding.about


def test_a_machine_without_megatron_needs_a_clone(monkeypatch, capsys):
    find = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "megatron" else find(name))
    assert cli(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("training can work with a clone of Megatron-LM alone: ")


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor.devices([])
    assert (finding.state, finding.stops) == ("broken", True) and "cannot be imported" in finding.about


def test_a_device_and_its_kernels(monkeypatch):
    about = SimpleNamespace(name="NVIDIA H100", total_memory=80 << 30, major=9, minor=0)
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_properties", about)):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    monkeypatch.setattr(doctor, "kernels_of", lambda place, dtype: f"some kernels on {place} in {dtype}")
    (finding,) = doctor.devices([])
    assert (finding.state, finding.name) == ("found", "device 0")
    assert finding.version == "NVIDIA H100, 80 GiB, sm_90"
    assert finding.about == "some kernels on cuda:0 in torch.bfloat16"


def test_the_kernels_of_a_device(monkeypatch):
    place = torch.device("cpu")
    with forced(chip="sm_80"):
        assert doctor.kernels_of(place, torch.bfloat16) == "general kernels for heads of 256 in bfloat16"
    monkeypatch.setattr(hopper, "problem", lambda: "this Triton is too new")
    with forced(chip="sm_90"):
        assert doctor.kernels_of(place, torch.bfloat16) == (
            "general kernels for heads of 256 in bfloat16; the Hopper kernels do not run: this Triton is too new"
        )


def test_what_triton_needs_to_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "nothing"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert [(finding.state, finding.name) for finding in doctor.compilers()] == [
        ("missing", "ptxas"), ("missing", "C compiler"), ("missing", "Python.h"),
    ]  # fmt: skip


@pytest.mark.parametrize("status", [0, 1, 2])
def test_kernels_decide_the_status_too(monkeypatch, status, capsys):
    monkeypatch.setattr("mom_layers.selftest.command.main", lambda argv: status)
    assert doctor.main(["--kernels"]) == status


def test_errors_of_the_command_line(capsys):
    for words, status in [(["--help"], 0), (["--no-such-option"], 2)]:
        with pytest.raises(SystemExit) as end:
            doctor.main(words)
        assert end.value.code == status
    assert "linear-moe doctor --kernels" in capsys.readouterr().out
