"""Memory update rules by their names."""

from __future__ import annotations

from mom_layers.recur.rules.rule import MemoryRule

_RULES: dict[str, MemoryRule] = {}
UNREGISTERED = "a rule of your own must be registered first, in the same process, by mom_layers.register_rule"


def register_rule(rule: MemoryRule) -> None:
    """Makes a rule available by its name. Raises ValueError for a name that another rule has."""
    if rule.name in _RULES:
        raise ValueError(f"a memory rule named {rule.name!r} is already registered")
    _RULES[rule.name] = rule


def rule_names() -> list[str]:
    """Names of the registered rules."""
    return sorted(_RULES)


def get_rule(name: str) -> MemoryRule:
    """The rule of that name. For an unknown name raises ValueError with the registered names."""
    if not isinstance(name, str) or name not in _RULES:
        raise ValueError(f"unknown memory rule {name!r}: choose one of {', '.join(rule_names())}; {UNREGISTERED}")
    return _RULES[name]
