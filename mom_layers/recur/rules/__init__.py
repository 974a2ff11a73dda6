"""Memory update rules: what a rule is, the registry, and one file a rule."""

from mom_layers.recur.rules import gated_deltanet, gated_deltanet2, gla, hgrn2, kda
from mom_layers.recur.rules.registry import get_rule, register_rule, rule_names
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs, kept_exact

for rule in (gated_deltanet.RULE, gla.RULE, hgrn2.RULE, kda.RULE, gated_deltanet2.RULE):
    register_rule(rule)

__all__ = ["MemoryRule", "RawGate", "RuleInputs", "get_rule", "kept_exact", "register_rule", "rule_names"]
