"""Which rules a test takes, so that the tests also fit a rule from an equation that somebody adds."""

from mom_layers import get_rule, rule_names


def composed() -> list[str]:
    """Names of the rules that context parallelism takes with any number of slices."""
    return [name for name in rule_names() if _composes(get_rule(name))]


def _composes(rule) -> bool:
    try:
        if rule.check_slices is not None:
            rule.check_slices(16, 32, 3)
    except ValueError:
        return False
    return True
