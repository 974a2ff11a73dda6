"""Why a layer's Triton kernels cannot run on a device, in one line, before a training run starts."""

from __future__ import annotations

import importlib.util
from importlib import import_module

import torch

from mom_layers.common.chips import Chip, chip_of
from mom_layers.recur.rules import MemoryRule, get_rule
from mom_layers.settings import MixerSettings

OLDEST_TRITON = (3, 5)
"""The oldest version that the kernels were tried with."""


def kernel_problem(settings: MixerSettings, dtype: torch.dtype, device: torch.device) -> str | None:
    """What keeps a layer's kernels from running on a device, in one line; None where nothing is known.

    Args:
        settings: of the layer, whose ``kernels`` may be anything: the answer is for "triton".
        dtype: of the layer's inputs.
        device: where the layer runs.
    """
    help_ = "--mom-kernels torch (kernels='torch') runs anywhere, slowly"
    if importlib.util.find_spec("triton") is None:
        return f"Triton is not installed: pip install triton, or {help_}"
    from mom_layers.common.triton_versions import VERSION

    rule, chip = get_rule(settings.rule), chip_of(device)
    for name, size, key in (("head_dim", settings.head_dim, True), ("head_dim * expand_v", settings.value_dim, False)):
        if size not in rule.kernel_sizes(of_keys=key):
            sizes = ", ".join(map(str, rule.kernel_sizes(of_keys=key)))
            return f"{name} = {size} is not supported by the {rule.name} kernels: use one of {sizes}, or {help_}"
    shown = ".".join(map(str, VERSION))
    if VERSION < OLDEST_TRITON:
        return f"Triton {shown} is installed, and the kernels need {'.'.join(map(str, OLDEST_TRITON))} or newer"
    return _memory_problem(rule, chip, dtype, max(settings.head_dim, settings.value_dim), help_)


def _memory_problem(rule: MemoryRule, chip: Chip, dtype: torch.dtype, size: int, help_: str) -> str | None:
    if chip.vendor == "amd" and dtype != torch.float32:
        return None  # the tables' numbers are of NVIDIA's compiler, and AMD's makes kernels that take less
    if not rule.family:
        return None
    table = import_module(f"mom_layers.recur.{rule.family}.triton.launches").table_for(chip, dtype)
    # The tables' numbers are for heads of 256; what smaller heads take shrinks with their size.
    needed = table.shared_memory * size // 256
    if needed > chip.shared_memory:
        return (
            f"{chip.name} has {chip.shared_memory} bytes of shared memory a program, and heads of {size} in {dtype} "
            f"take about {needed}: choose smaller heads, or {help_}"
        )
    return None
