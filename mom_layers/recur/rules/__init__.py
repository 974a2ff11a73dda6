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

for rule in (gated_deltanet.RULE, gla.RULE, hgrn2.RULE, kda.RULE, gated_deltanet2.RULE):
    register_rule(rule)
for module in (based, deltanet, lightning, mamba2, rebased, retention):
    register_rule(module.RULE)
for rule in LINEAR_ATTENTION:
    register_rule(rule)

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
