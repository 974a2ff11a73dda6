"""A change to another package's code: named, reversible, and refused with a message where the change does not fit.

Megatron has no hook for a few things that this project needs. Each of them is a `Patch`: a list of `Target`s, each an
attribute of a module and the replacement for that attribute. For example, to report one more metric in Megatron's log:

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

import importlib
import logging
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from megatron_patches import releases
from megatron_patches.target import Target, replace, wrap

__all__ = ["Patch", "PatchError", "Target", "applied", "apply_all", "replace", "undo_all", "wrap"]

logger = logging.getLogger(__name__)


class PatchError(RuntimeError):
    """A patch does not fit the installed Megatron, or cannot be undone in the order asked for."""


@dataclass
class _Place:
    """Where a target stands in the running Megatron, the original there, and the replacement."""

    path: str
    owner: Any
    name: str
    inherited: bool  # a method that the class has from a base class: undoing the patch deletes the replacement
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
_applied: dict[str, tuple["Patch", list[_Place]]] = {}


@dataclass(frozen=True)
class Patch:
    """A named set of replacements that is applied as a whole or not at all.

    name: identifies it. Two patches of one name are the same patch.
    reason: why Megatron has to be changed.
    removed_when: the change in Megatron that would make it unnecessary.
    targets: what is replaced. A function that modules of Megatron imported by name before (`from x import y`) is
        replaced there too; modules imported later import the replacement.
    """

    name: str
    reason: str
    removed_when: str
    targets: tuple[Target, ...]

    @property
    def is_applied(self) -> bool:
        return self.name in _applied

    def apply(self) -> None:
        """Puts every replacement in place and logs the patch's reason, once. A second call does nothing.

        Raises PatchError, having changed nothing, when a target does not exist.
        """
        if self.is_applied:
            return
        places = [place for target in self.targets if (place := self._find(target)) is not None]
        done: list[_Place] = []
        try:
            for place in places:
                place.put()
                done.append(place)
        except (AttributeError, TypeError) as error:
            for place in reversed(done):
                place.restore()
            raise self._misfit(f"{places[len(done)].path} cannot be assigned") from error
        _swap_imported_names((place.name, place.original, place.replacement) for place in places)
        _applied[self.name] = (self, places)
        logger.info("patch %s applied: %s", self.name, self.reason)
        if not releases.is_supported():
            logger.warning("patch %s fits, but %s", self.name, releases.versions())

    def undo(self) -> None:
        """Puts every original back, the same object as before. Does nothing when the patch is not applied.

        Raises PatchError, having changed nothing, when a later patch covers one of the targets: undo that one first.
        """
        if not self.is_applied:
            return
        _, places = _applied[self.name]
        for place in places:
            if _stored(place.owner, place.name) is not place.replacement:
                raise PatchError(
                    f"patch '{self.name}' cannot be undone: a later patch replaced {place.path}, undo that patch first"
                )
        for place in reversed(places):
            place.restore()
        _swap_imported_names((place.name, place.replacement, place.original) for place in places)
        del _applied[self.name]

    def _find(self, target: Target) -> _Place | None:
        located = releases.locate(target)
        if located is None:
            return None
        module, attribute = located
        try:
            owner: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise self._misfit(f"there is no module {error.name}") from error
        *path, name = attribute.split(".")
        for part in path:
            owner = getattr(owner, part, _MISSING)
        if owner is _MISSING or not hasattr(owner, name):
            raise self._misfit(f"there is no {module}.{attribute}")
        original = _stored(owner, name)
        if isinstance(original, (staticmethod, classmethod)):
            replacement: Any = type(original)(target.build(original.__func__))
        else:
            replacement = target.build(original)
        inherited = isinstance(owner, type) and name not in vars(owner)
        return _Place(f"{module}.{attribute}", owner, name, inherited, original, replacement)

    def _misfit(self, problem: str) -> PatchError:
        return PatchError(f"patch '{self.name}' cannot be applied: {problem}; {releases.versions()}")


def apply_all(patches: Iterable[Patch]) -> None:
    """Applies several patches in order. When one of them raises, the patches that this call applied are undone."""
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


def _stored(owner: Any, name: str) -> Any:
    """The attribute as the owner stores it: a static method as the object that wraps its function."""
    return vars(owner)[name] if name in vars(owner) else getattr(owner, name)


def _swap_imported_names(swaps: Iterable[tuple[str, Any, Any]]) -> None:
    """Exchanges (name, old, new) in the globals of Megatron's modules, because `from x import y` binds a second name.

    Only callables are exchanged: a constant such as True is the same object in every module that has it.
    """
    swaps = [swap for swap in swaps if callable(swap[1])]
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "megatron" or not isinstance(module, ModuleType):
            continue
        names = vars(module)
        for name, old, new in swaps:
            if names.get(name) is old:
                setattr(module, name, new)
