"""Requirements are ranges: pip changes no package of a container. Only tools/constraints.txt has exact versions."""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]

# What NVIDIA's containers have, by the metadata that pip reads: name, version, requirements. Small packages that other
# packages replace at any time, such as typing-extensions, are left out.
PYTORCH_CONTAINER = [
    ("torch", "2.10.0a0+b4e4ee81d3.nv25.12", "filelock", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"),
    ("triton", "3.5.0"),
    ("numpy", "1.26.4"),
    ("transformer-engine", "2.10.0", "packaging"),
    ("sympy", "1.14.0", "mpmath<1.4,>=1.1.0"),
    ("networkx", "3.5"),
    ("mpmath", "1.3.0"),
    ("jinja2", "3.1.6", "MarkupSafe>=2.0"),
    ("markupsafe", "3.0.3"),
    ("filelock", "3.20.0"),
    ("fsspec", "2025.9.0"),
    ("packaging", "25.0"),
    ("pyyaml", "6.0.3"),
    ("psutil", "7.1.0"),
    ("setuptools", "79.0.1"),
    ("matplotlib", "3.10.7", "contourpy>=1.0.1", "numpy>=1.23", "packaging>=20.0", "pillow>=8"),
    ("contourpy", "1.3.3", "numpy>=1.25"),
    ("pillow", "12.0.0"),
    ("scipy", "1.16.1", "numpy<2.6,>=1.25.2"),
    ("tensorboard", "2.16.2", "numpy>=1.12.0"),
]
NEMO_CONTAINER = [
    *(package for package in PYTORCH_CONTAINER if package[0] != "torch"),
    ("torch", "2.9.0a0+145a3a7bda.nv25.10", "filelock", "sympy>=1.13.3", "networkx>=2.5.1", "jinja2", "fsspec>=0.8.5"),
    ("transformers", "4.57.1", "huggingface-hub<1.0,>=0.34.0", "numpy>=1.17", "tokenizers<=0.23.0,>=0.22.0",
     "safetensors>=0.4.3", "pyyaml>=5.1", "packaging>=20.0", "filelock", "requests", "tqdm>=4.27"),
    ("tokenizers", "0.22.1", "huggingface-hub<2.0,>=0.16.4"),
    ("huggingface-hub", "0.36.0", "filelock", "fsspec>=2023.5.0", "packaging>=20.9", "pyyaml>=5.1", "requests"),
    ("safetensors", "0.6.2"),
    ("accelerate", "1.11.0", "numpy<3.0.0,>=1.17", "packaging>=20.0", "psutil", "pyyaml", "torch>=2.0.0",
     "huggingface-hub>=0.21.0", "safetensors>=0.4.3"),
    ("megatron-core", "0.18.0", "torch>=2.6.0", "numpy", "packaging>=24.2",
     *(f"{name}; extra == 'training'" for name in ("sentencepiece", "tiktoken", "wandb", "transformers", "omegaconf"))),
    ("wandb", "0.22.2"),
    ("tqdm", "4.67.1"),
    ("zstandard", "0.25.0"),
    ("datasets", "4.1.1", "numpy>=1.17", "huggingface-hub>=0.24.0", "fsspec<=2025.9.0,>=2023.1.0"),
]  # fmt: skip
CONTAINERS = {"PyTorch": PYTORCH_CONTAINER, "NeMo": NEMO_CONTAINER}


def write_metadata(site: Path, name: str, number: str, *requires: str) -> None:
    """The folder by which pip finds an installed package."""
    folder = site / f"{name.replace('-', '_')}-{number}.dist-info"
    folder.mkdir()
    extras = {"Provides-Extra: training\n" for text in requires if "extra ==" in text}
    lines = [f"Requires-Dist: {text}\n" for text in requires]
    header = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
    (folder / "METADATA").write_text(header + "".join([*extras, *lines]))
    (folder / "RECORD").touch()
    (folder / "INSTALLER").write_text("pip\n")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("linear_moe", "megatron_patches", "mom_layers"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", folder, source], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module", params=CONTAINERS)
def container(request, tmp_path_factory):
    """Python of an environment with the metadata of a container's packages, and their names."""
    folder = tmp_path_factory.mktemp("container")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in CONTAINERS[request.param]:
        write_metadata(site, *package)
    return folder / "bin/python", {package[0] for package in CONTAINERS[request.param]}


def would_install(python: Path, wheel: Path, *extras: str) -> set[str]:
    """Names of the packages that pip would install or replace."""
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    done = subprocess.run([*pip, "install", "--dry-run", wanted], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    line = re.search(r"^Would install (.*)$", done.stdout, re.MULTILINE)[1]
    return {word.rpartition("-")[0].lower().replace("_", "-") for word in line.split()}


@pytest.mark.parametrize("extras", [(), *((extra,) for extra in EXTRAS)], ids="+".join)
def test_pip_changes_no_package_of_a_container(container, wheel, extras):
    python, present = container
    installed = would_install(python, wheel, *extras)
    assert "linear-moe" in installed
    assert installed & present == set()
    if not extras:
        assert installed == {"linear-moe"}


def test_the_dry_run_shows_a_change(wheel, tmp_path):
    """pip replaces a package that is older than the range."""
    venv.create(tmp_path, with_pip=False, symlinks=True)
    (site,) = tmp_path.glob("lib/python*/site-packages")
    for package in NEMO_CONTAINER:
        write_metadata(site, *(("numpy", "1.20.0") if package[0] == "numpy" else package))
    assert "numpy" in would_install(tmp_path / "bin/python", wheel, "megatron")


def test_only_the_constraints_are_exact():
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    for name in ("requirements.txt", "tests/requirements.txt"):
        texts += [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    assert [text for text in texts if "==" in text] == []
    lines = (ROOT / "tools/constraints.txt").read_text().splitlines()
    exact = [line.partition(";")[0].strip() for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in exact)
    constrained = {line.partition("==")[0] for line in exact}
    names = {re.match(r"[\w-]+", text)[0].lower().replace("_", "-") for text in texts}
    assert names - constrained - {"linear-moe", "transformer-engine"} == set()


def test_requirements_are_the_extra_train():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    train = [*PROJECT["dependencies"], *EXTRAS["train"], *EXTRAS["hf"], *EXTRAS["megatron"]]
    names = {re.match(r"[\w-]+", text)[0] for text in EXTRAS["train"]}  # those of train go before those of megatron
    expected = {
        text for text in train
        if not text.startswith("linear-moe") and (text in EXTRAS["train"] or re.match(r"[\w-]+", text)[0] not in names)
    }  # fmt: skip
    assert {line for line in lines if not line.startswith("#")} == expected


def test_one_version_everywhere():
    import linear_moe
    import mom_layers

    number = linear_moe.__version__
    assert mom_layers.__version__ == number
    assert f"\nversion: {number}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {number}" in (ROOT / "CHANGELOG.md").read_text()
