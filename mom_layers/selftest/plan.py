"""What one self-test is made of, in words that travel to another process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch

from mom_layers.selftest import checks
from mom_layers.selftest.cases import Check, Setting
from mom_layers.settings import MixerSettings


@dataclass(frozen=True)
class Plan:
    """Attributes:
    device: "cuda" or "cpu".
    dtype: a name such as "bfloat16".
    repeats: runs of the kernels in every case.
    only: parts of names; other checks are left out. Empty for all.
    run: the fields of `MixerSettings`, and ``hidden_size`` and ``sliced``, of one training run whose kernels are
        checked; None for all kernels.
    """

    device: str
    dtype: str
    repeats: int = 3
    only: tuple[str, ...] = ()
    run: dict | None = None

    @property
    def setting(self) -> Setting:
        return Setting(self.device, getattr(torch, self.dtype), self.repeats)

    def checks(self) -> dict[str, Check]:
        """The checks by name, in the order in which processes should take them."""
        if self.run is not None:
            sizes = dict(self.run)
            hidden_size, sliced = sizes.pop("hidden_size"), sizes.pop("sliced")
            found = checks.checks_of_a_run(self.setting, MixerSettings(**sizes), hidden_size, sliced)
        elif self.device == "cpu":
            found = checks.tiny_checks(self.setting)
        else:
            found = checks.all_checks(self.setting)
        return {
            name: check for name, check in found.items() if not self.only or any(part in name for part in self.only)
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        plan = cls(**json.loads(text))
        return replace(plan, only=tuple(plan.only))
