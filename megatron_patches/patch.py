"""A change to somebody else's code: named, reversible, and loud when it no longer fits.

Megatron has no hook for a few things that we need. Each of them is a `Patch`: a list of `Target`s, each an attribute
of a module and the replacement to put there. For example, to report one more metric whenever Megatron logs:

    def log_memory_load(training_log, *args, **kwargs):
        skip = training_log(*args, **kwargs)
        print("memory load", tracker.report())
        return skip

    MEMORY_LOAD = Patch(
        name="memory-load",
        reason="training_log has no callback for a metric of ours",
        removed_when="megatron.training accepts extra metrics",
        targets=(wrap("megatron.training.training", "training_log", log_memory_load),),
    )
    MEMORY_LOAD.apply()

`apply` may be called any number of times. It imports the modules that it changes.
"""

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

SUPPORTED_MEGATRON_CORE = "0.19.2"

logger = logging.getLogger(__name__)


class PatchError(RuntimeError):
    """A patch does not fit the installed Megatron, or cannot be taken back as asked."""


@dataclass(frozen=True)
class Target:
    """One attribute to replace.

    module: dotted path of the module that owns it.
    attribute: its name, `Class.method` for a method.
    build: receives the original and returns the replacement. For a static or class method it receives the function
        inside, and what it returns is made a static or class method again.
    """

    module: str
    attribute: str
    build: Callable[[Any], Any]

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"


def replace(module: str, attribute: str, replacement: Any) -> Target:
    """Target that puts `replacement` in the place of the attribute, whatever it was."""
    return Target(module, attribute, lambda original: replacement)


def wrap(module: str, attribute: str, around: Callable[..., Any]) -> Target:
    """Target that turns every call `attribute(*args, **kwargs)` into `around(original, *args, **kwargs)`."""

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def wrapped(*args, **kwargs):
            return around(original, *args, **kwargs)

        return wrapped

    return Target(module, attribute, build)


@dataclass
class _Slot:
    """Where a target lives, what was there, and what is put there."""

    target: Target
    owner: Any
    name: str
    inherited: bool  # a method that the class has from a base: taking the patch back then deletes ours
    original: Any
    replacement: Any

    def put(self) -> None:
        setattr(self.owner, self.name, self.replacement)

    def restore(self) -> None:
        if self.inherited:
            delattr(self.owner, self.name)
        else:
            setattr(self.owner, self.name, self.original)


_MISSING = object()
_applied: dict[str, tuple["Patch", list[_Slot]]] = {}


@dataclass(frozen=True)
class Patch:
    """A named set of replacements that is applied as a whole or not at all.

    name: identifies it. Two patches of one name are the same patch.
    reason: why Megatron has to be changed.
    removed_when: the change in Megatron that would make it unnecessary.
    targets: what is replaced. A function that modules of Megatron imported by name before (`from x import y`) is
        replaced there too; those imported later find the replacement by themselves.
    """

    name: str
    reason: str
    removed_when: str
    targets: tuple[Target, ...]

    @property
    def is_applied(self) -> bool:
        return self.name in _applied

    def apply(self) -> None:
        """Puts every replacement in place and logs so, once. A second call does nothing.

        Raises PatchError, having changed nothing, when a target does not exist.
        """
        if self.is_applied:
            return
        slots = [self._locate(target) for target in self.targets]
        done: list[_Slot] = []
        try:
            for slot in slots:
                slot.put()
                done.append(slot)
        except (AttributeError, TypeError) as error:
            for slot in reversed(done):
                slot.restore()
            raise self._misfit(f"{slots[len(done)].target} cannot be assigned") from error
        _swap_imported_names((slot.name, slot.original, slot.replacement) for slot in slots)
        _applied[self.name] = (self, slots)
        logger.info("patch %s applied: %s", self.name, self.reason)
        if _series(installed_megatron_core()) != _series(SUPPORTED_MEGATRON_CORE):
            logger.warning("patch %s fits, but %s", self.name, _versions())

    def undo(self) -> None:
        """Puts every original back, the same object as before. Does nothing when the patch is not applied.

        Raises PatchError, having changed nothing, when a later patch covers one of the targets: undo that one first.
        """
        if not self.is_applied:
            return
        _, slots = _applied[self.name]
        for slot in slots:
            if _stored(slot.owner, slot.name) is not slot.replacement:
                raise PatchError(
                    f"patch '{self.name}' cannot be undone: {slot.target} was replaced again since, undo that first"
                )
        for slot in reversed(slots):
            slot.restore()
        _swap_imported_names((slot.name, slot.replacement, slot.original) for slot in slots)
        del _applied[self.name]

    def _locate(self, target: Target) -> _Slot:
        try:
            owner: Any = importlib.import_module(target.module)
        except ModuleNotFoundError as error:
            raise self._misfit(f"there is no module {error.name}") from error
        *path, name = target.attribute.split(".")
        for part in path:
            owner = getattr(owner, part, _MISSING)
        if owner is _MISSING or not hasattr(owner, name):
            raise self._misfit(f"there is no {target}")
        original = _stored(owner, name)
        if isinstance(original, (staticmethod, classmethod)):
            replacement: Any = type(original)(target.build(original.__func__))
        else:
            replacement = target.build(original)
        inherited = isinstance(owner, type) and name not in vars(owner)
        return _Slot(target, owner, name, inherited, original, replacement)

    def _misfit(self, problem: str) -> PatchError:
        return PatchError(f"patch '{self.name}' cannot be applied: {problem}; {_versions()}")


def apply_all(patches: Iterable[Patch]) -> None:
    """Applies several patches in order. When one is refused, those that this call applied are undone."""
    new: list[Patch] = []
    try:
        for patch in patches:
            if not patch.is_applied:
                patch.apply()
                new.append(patch)
    except BaseException:
        undo_all(new)
        raise


def undo_all(patches: Iterable[Patch]) -> None:
    """Undoes several patches, the last one first."""
    for patch in reversed(list(patches)):
        patch.undo()


def applied() -> tuple[Patch, ...]:
    """The patches in effect in this process, in the order in which they were applied."""
    return tuple(patch for patch, _ in _applied.values())


def installed_megatron_core() -> str | None:
    """Version of the megatron.core that this process imports, a clone's or the wheel's; None when there is none."""
    try:
        return importlib.import_module("megatron.core.package_info").__version__.partition("+")[0]
    except ImportError:
        return None


def _series(release: str | None) -> list[str]:
    return (release or "").split(".")[:2]


def _versions() -> str:
    return f"megatron-core {installed_megatron_core()} is installed, {SUPPORTED_MEGATRON_CORE} is supported"


def _stored(owner: Any, name: str) -> Any:
    """The attribute as it is stored: a static method of a class as the object that wraps its function."""
    return vars(owner)[name] if name in vars(owner) else getattr(owner, name)


def _swap_imported_names(swaps: Iterable[tuple[str, Any, Any]]) -> None:
    """Exchanges (name, old, new) in the globals of Megatron's modules, for `from x import y` binds a second name.

    Only callables: a constant such as True is one object everywhere.
    """
    swaps = [swap for swap in swaps if callable(swap[1])]
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "megatron" or not isinstance(module, ModuleType):
            continue
        names = vars(module)
        for name, old, new in swaps:
            if names.get(name) is old:
                setattr(module, name, new)
