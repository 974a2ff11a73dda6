"""One attribute of another package, and the replacement for that attribute."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One attribute to replace.

    module: dotted path of the module that owns the attribute, as in the newest supported release of Megatron
        (`megatron_patches.releases` has the path in other releases).
    attribute: name of the attribute, `Class.method` for a method.
    build: receives the original and returns the replacement. For a static or class method `build` receives the
        function inside, and its result becomes a static or class method again.
    """

    module: str
    attribute: str
    build: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


def replace(module: str, attribute: str, replacement: Any) -> Target:
    """Target that puts `replacement` in the place of the attribute, whatever the attribute was."""
    return Target(module, attribute, lambda original: replacement)


def wrap(module: str, attribute: str, around: Callable[..., Any]) -> Target:
    """Target that turns every call `attribute(*args, **kwargs)` into `around(original, *args, **kwargs)`."""

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            return around(original, *args, **kwargs)

        return wrapped

    return Target(module, attribute, build)
