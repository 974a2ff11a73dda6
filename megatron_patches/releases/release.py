"""What a release of Megatron may do in its own way."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_patches.target import Target

Place = tuple[str, str]
"""Dotted path of a module, and a name in that module (`Class.method` for a method)."""


@dataclass(frozen=True)
class ModelHooks:
    """The functions by which a package puts its own layers into Megatron's models.

    configure: called in place of `core_transformer_config_from_args`, with that function as the first argument.
    layers: the specs of a model's decoder layers, from its TransformerConfig and virtual pipeline stage; None for a
        model that keeps Megatron's own layers.
    stack: the spec of a hybrid model's layers, from the model's TransformerConfig and the spec that Megatron would use.
    routed_memories: number of memories that the routers of a model choose from, from its TransformerConfig; None for
        a model without such routers.
    """

    configure: Callable[..., Any]
    layers: Callable[[Any, int | None], Any | None]
    stack: Callable[[Any, Any | None], Any]
    routed_memories: Callable[[Any], int | None]


def _nothing(*_) -> tuple:
    return ()


@dataclass(frozen=True)
class Release:
    """One release series, described by its differences from the series that the code is written for.

    series: the first two numbers of megatron-core's version.
    moved: where this release keeps an attribute that a patch replaces: the place in the code's targets -> the place
        here, or None where the release has no such attribute (a patch then leaves the target out).
    lacks: arguments that this release's parser does not have, each with the value that means "off".
    refusals: (present, what, instead) for everything in the arguments of a run that does not work in this release.
    model_targets: more targets of the patch that chooses a model's configuration and layers.
    """

    series: str
    moved: Mapping[Place, Place | None] = field(default_factory=dict)
    lacks: Mapping[str, Any] = field(default_factory=dict)
    refusals: Callable[[Namespace], tuple[tuple[object, str, str], ...]] = _nothing
    model_targets: Callable[[ModelHooks], tuple[Target, ...]] = _nothing
