"""Memory update rules: what a rule is, the registry, and one file a rule."""

from mom_layers.recur.rules import (
    based,
    deltanet,
    gated_deltanet,
    gated_deltanet2,
    gla,
    hgrn2,
    kda,
    lightning,
    mamba2,
    rebased,
    retention,
)
from mom_layers.recur.rules.equation import rule_from_equation
from mom_layers.recur.rules.linear_attention import RULES as LINEAR_ATTENTION
from mom_layers.recur.rules.registry import get_rule, register_rule, rule_names
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs, kept_exact, warn_without_kernels

RULES = (
    gated_deltanet, gated_deltanet2, deltanet, kda, gla, hgrn2, mamba2, retention, lightning, based, rebased,
)  # fmt: skip
for known in (*(module.RULE for module in RULES), *LINEAR_ATTENTION):  # "rule" is the name of a file here
    register_rule(known)

__all__ = [
    "MemoryRule",
    "RawGate",
    "RuleInputs",
    "get_rule",
    "kept_exact",
    "register_rule",
    "rule_from_equation",
    "rule_names",
    "warn_without_kernels",
]
