"""Memory update rules, by name."""

from mom_layers.recur.rules import gated_deltanet, gla
from mom_layers.recur.rules.registry import MemoryRule, get_rule, kept_exact, register_rule, rule_names

register_rule(gated_deltanet.RULE)
register_rule(gla.RULE)

__all__ = ["MemoryRule", "get_rule", "kept_exact", "register_rule", "rule_names"]
