"""The supported release series of Megatron, a file each, and the series that this process imports.

To support another series: add a file with its `Release`, and name the file in `RELEASES`.
"""

import importlib
from argparse import Namespace
from typing import Any

from megatron_patches.releases import core_v018, core_v019
from megatron_patches.releases.release import ModelHooks, Release
from megatron_patches.target import Target

__all__ = [
    "RELEASES", "ModelHooks", "Release", "argument", "installed_megatron_core", "is_supported", "locate", "running",
    "versions", "why_too_old",
]  # fmt: skip

RELEASES = (core_v019.RELEASE, core_v018.RELEASE)
"""The release that the code is written for comes first."""


def installed_megatron_core() -> str | None:
    """Version of the megatron.core that this process imports, a clone's or the wheel's; None when there is none."""
    try:
        return importlib.import_module("megatron.core.package_info").__version__.partition("+")[0]
    except ImportError:
        return None


def is_supported() -> bool:
    """Whether the series of the running Megatron is in `RELEASES`."""
    return _series() in {release.series for release in RELEASES}


def why_too_old() -> str | None:
    """Why nothing of this project works with the running Megatron: it is older than every series of `RELEASES`. None
    for a newer Megatron, and where there is none.
    """
    installed = installed_megatron_core()
    oldest = min(tuple(map(int, release.series.split("."))) for release in RELEASES)
    if installed is None or tuple(map(int, _series().split("."))) >= oldest:
        return None
    return (
        f"megatron-core {installed} is too old: {' and '.join(sorted(release.series for release in RELEASES))} are "
        "supported; pip install -U megatron-core, or take a newer Megatron-LM"
    )


def running() -> Release:
    """The release that this process imports; the first of `RELEASES` where the running series is in none of them."""
    series = _series()
    return next((release for release in RELEASES if release.series == series), RELEASES[0])


def versions() -> str:
    """The installed version and the supported series, for messages."""
    supported = " and ".join(release.series for release in RELEASES)
    return f"megatron-core {installed_megatron_core()} is installed, {supported} are supported"


def locate(target: Target) -> tuple[str, str] | None:
    """Module and attribute of a target in the running release; None where the release has no such place."""
    place = target.module, target.attribute
    if target.module.partition(".")[0] != "megatron":
        return place
    return running().moved.get(place, place)


def argument(args: Namespace, name: str) -> Any:
    """Value of one of Megatron's arguments; in a release without the argument, the value that switches it off."""
    lacking = running().lacks
    return lacking[name] if name in lacking else getattr(args, name)


def _series() -> str:
    return ".".join((installed_megatron_core() or "").split(".")[:2])
