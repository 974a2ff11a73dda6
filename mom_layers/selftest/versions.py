"""The chip, and the versions on which a kernel's code depends."""

from __future__ import annotations

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mom_layers

# Rooms that launch no kernel.
WITHOUT_KERNELS = ("hf", "selftest")


def package_version(name: str) -> str:
    """The installed version of a package; "none" where the package is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def triton_version() -> str:
    """The version of Triton that is imported: PyTorch's containers have it under other package names."""
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def kernels_digest() -> str:
    """Twelve hexadecimal digits of a digest over the source of everything in mom_layers that launches kernels."""
    root, digest = Path(mom_layers.__file__).parent, hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if name.parts[0] not in WITHOUT_KERNELS:
            digest.update(f"{name}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def chip_name(device: int = 0) -> str:
    """The device's name and its architecture; "Triton's interpreter" without a device."""
    if not torch.cuda.is_available():
        return "Triton's interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return f"{properties.name} ({properties.gcnArchName.partition(':')[0]})"
    return f"{properties.name} (sm_{properties.major}{properties.minor})"


def versions() -> dict[str, str]:
    """What a report must say, by name."""
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda or 'none'}"
    found = {
        "chip": chip_name(),
        "torch": f"{torch.__version__}, {runtime}",
        "Triton": triton_version(),
        "linear-moe": f"{package_version('linear-moe')}, kernels {kernels_digest()}",
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["chip"] += (
            f", {torch.cuda.device_count()} of them, {properties.multi_processor_count} multiprocessors, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found
