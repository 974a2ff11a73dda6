"""The short self-test of the kernels before a run's first step on a new chip or with a new Triton.

Compilers have made wrong code for such kernels without any error: a model then trains with wrong gradients. The check
runs the kernels that this run launches, at its head sizes, beside plain PyTorch in float64, in a process of its own.
The result is kept beside Triton's cache, so that later runs start without the check.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from linear_moe.config import has_memories
from linear_moe.temporary import replaced_file
from mom_layers.kernel_problems import kernel_problem
from mom_layers.selftest.cases import Line
from mom_layers.selftest.plan import Plan
from mom_layers.selftest.processes import check_all
from mom_layers.selftest.report import reasons
from mom_layers.selftest.versions import chip_name, kernels_digest, triton_version
from mom_layers.settings import MixerSettings

logger = logging.getLogger(__name__)
VARIABLE = "MOM_KERNEL_CHECK"
"""0 skips the check, where no argument of ours can be given."""
FORCING = ("MOM_CHIP", "MOM_KERNEL_SET")
"""Variables of mom_layers that choose other kernels than the chip's own."""
PROCESSES = 3
SHOWN = 3  # kernels that a message names
# Seconds: how long other ranks of a node wait for the rank that checks, how often they look, and how much earlier than
# they that rank may have begun.
WAIT, LOOK_AGAIN, AHEAD = 180.0, 0.5, 60.0
RIGHT, UNCHECKED = "right", "unchecked"


class KernelError(ValueError):
    """A kernel computes wrong numbers, or fails, on this chip."""


def check_kernels(args) -> None:
    """Checks the kernels of a run once for a chip and for versions.

    Raises KernelError where a kernel is wrong, or where a head size, a chip or a version is known not to run.

    On every node the rank with LOCAL_RANK 0 checks, and the others wait for its result.

    Args:
        args: Megatron's, validated, with our arguments filled.
    """
    if has_memories(args) and args.mom_kernels != "torch" and torch.cuda.is_available():
        problem = kernel_problem(settings_of(args), args.params_dtype, torch.device("cuda", _device()))
        if problem is not None:
            raise KernelError(problem)
    if not is_wanted(args):
        return
    plan = plan_of(args)
    place = f"{chip_name(_device())} with Triton {triton_version()}, PyTorch {torch.__version__}"
    forced = [os.environ.get(variable) for variable in FORCING]
    key = f"{place} {kernels_digest()} {plan.to_json()} {forced}"
    name = hashlib.sha256(key.encode()).hexdigest()[:24] + ".json"
    files = [folder / name for folder in (kept_folder(), node_folder())]
    if os.environ.get("LOCAL_RANK", "0") == "0":
        _check_here(plan, place, files)
    else:
        _wait_for_result(place, files)


def _device() -> int:
    """The number of this rank's device."""
    return int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()


def is_wanted(args) -> bool:
    """Whether a run launches Triton kernels, and the user lets them be checked."""
    if getattr(args, "kernel_check", None) is False or os.environ.get(VARIABLE, "1").lower() in ("0", "false"):
        return False
    return has_memories(args) and args.mom_kernels != "torch" and torch.cuda.is_available()


def settings_of(args) -> MixerSettings:
    """The settings of a run's layers."""
    names = [field.name for field in fields(MixerSettings) if hasattr(args, f"mom_{field.name}")]
    return MixerSettings(**{name: getattr(args, f"mom_{name}") for name in names})


def plan_of(args) -> Plan:
    """The checks for a run's layers, with the heads of one tensor-parallel rank."""
    settings = settings_of(args)
    heads = max(1, settings.num_heads // args.tensor_model_parallel_size)
    run = asdict(replace(settings, num_heads=heads))
    run |= {"hidden_size": args.hidden_size, "sliced": args.context_parallel_size > 1}
    return Plan("cuda", str(args.params_dtype).removeprefix("torch."), run=run)


def kept_folder() -> Path:
    """Beside Triton's cache: results outlast the job."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    return (Path(cache) if cache else Path.home() / ".triton") / "mom-kernel-checks"


def node_folder() -> Path:
    """A folder of the node and the user, for ranks that each have a cache of their own."""
    return Path(tempfile.gettempdir()) / f"mom-kernel-checks-{os.getuid()}"


def _check_here(plan: Plan, place: str, files: list[Path]) -> None:
    if _read(files[0]) == RIGHT:
        _write(files[1:], RIGHT)  # for ranks that have another cache
        return
    logger.info(
        "kernels: checking them once on %s (half a minute with an empty cache; --no-kernel-check skips this)",
        place,
    )
    start = time.monotonic()
    lines = [line for found in check_all(plan, PROCESSES).values() for line in found]
    wrong = [line for line in lines if not line.right and not line.unknown]
    if wrong:
        message = describe(wrong, place)
        _write(files[1:], message)
        raise KernelError(message)
    unknown = [line for line in lines if line.unknown]
    if unknown:
        logger.warning(
            "kernels: %d of %d could not be checked on %s (%s: %s); the next run tries again",
            len(unknown), len(lines), place, unknown[0].kernel, unknown[0].failure,
        )  # fmt: skip
        _write(files[1:], UNCHECKED)
        return
    logger.info("kernels: %d are right, checked in %.0f seconds", len(lines), time.monotonic() - start)
    _write(files, RIGHT)


def describe(wrong: list[Line], place: str) -> str:
    """The kernels that are wrong or fail, the chip, the versions, and what to do."""
    words = [
        f"{line.kernel} ({line.shape})".replace(" ()", "")
        + f": {'; '.join(reason.strip() for reason in reasons(line))}"
        for line in wrong
    ]
    if len(words) > SHOWN:
        words[SHOWN:] = [f"and {len(words) - SHOWN} more"]
    what = "wrong kernels on" if any(line.wrong for line in wrong) else "kernels fail on"
    return (
        f"{what} {place}: {' | '.join(words)}. Use --mom-kernels torch, or another version of Triton; "
        "python -m mom_layers.selftest says more, --no-kernel-check trains anyway"
    )


def _wait_for_result(place: str, files: list[Path]) -> None:
    """Waits for the result of the rank that checks. Raises KernelError with that rank's message."""
    start = time.time()
    while True:
        for file in files:
            result = _read(file)
            if result == RIGHT:
                return
            # What is older is of an earlier run: the kernels are checked again.
            if result is not None and _written(file) >= start - AHEAD:
                if result == UNCHECKED:
                    return
                raise KernelError(result)
        if time.time() - start > WAIT:
            logger.warning("kernels: no result of the check on %s after %.0f seconds; training goes on", place, WAIT)
            return
        time.sleep(LOOK_AGAIN)


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _read(file: Path) -> str | None:
    """What a file says; None where there is no file of this user."""
    try:
        if file.stat().st_uid != os.getuid():
            return None
        return json.loads(file.read_text())["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(files: list[Path], result: str) -> None:
    """Writes a result. A folder that cannot be written means that the next run checks again."""
    for file in files:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with replaced_file(file) as partial:
                partial.write_text(json.dumps({"result": result}) + "\n")
        except OSError as error:
            logger.info("kernels: the result of the check is not kept in %s: %s", file.parent, error.strerror)
