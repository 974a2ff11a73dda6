"""The symbol R of a hybrid model's pattern: Megatron's list of symbols is closed, and so is its choice of layers."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from linear_moe.pattern import GATED_DELTA_NET, MEMORY
from megatron_patches.patch import Patch, Target, wrap


@dataclass
class MemoryStackSubmodules(HybridStackSubmodules):
    """Specs of a hybrid model's layers, with the layer of the symbol R beside Megatron's own."""

    memory_layer: ModuleSpec | type = IdentityOp

    @classmethod
    def beside(cls, others: HybridStackSubmodules, memory_layer: ModuleSpec) -> MemoryStackSubmodules:
        """Megatron's specs, each as it is, and the layer of the symbol R."""
        own = {field.name: getattr(others, field.name) for field in fields(HybridStackSubmodules)}
        return cls(**own, memory_layer=memory_layer)


class _LayerOfSymbol:
    """Builds the layer of the symbol R, or of G, in the place of a layer G: the layers of a stack are built in their
    order, so that a seed draws the same weights as in a GPTModel.

    specs: the layer's number, from 1 over the whole model -> the spec.
    """

    def __new__(cls, *, layer_number: int, specs: dict[int, ModuleSpec], **keywords):
        return build_module(specs[layer_number], layer_number=layer_number, **keywords)


def _build_stack(build, stack, config, submodules, *args, layer_type_list=None, pp_layer_offset=0, **keywords):
    """HybridStack.__init__ for a list of symbols that may have an R."""
    symbols = layer_type_list
    if symbols is not None and MEMORY in symbols:
        if not isinstance(submodules, MemoryStackSubmodules):
            raise ValueError(
                f"the pattern has the symbol {MEMORY}, and the model's specs have no such layer: start the run by "
                "python -m linear_moe SCRIPT, or by linear_moe.pretrain"
            )
        specs = {MEMORY: submodules.memory_layer, GATED_DELTA_NET: submodules.gdn_layer}
        chosen = {
            number: specs[symbol] for number, symbol in enumerate(symbols, 1 + pp_layer_offset) if symbol in specs
        }
        submodules = replace(submodules, gdn_layer=ModuleSpec(module=_LayerOfSymbol, params={"specs": chosen}))
        layer_type_list = [GATED_DELTA_NET if symbol == MEMORY else symbol for symbol in symbols]
    build(
        stack, config, submodules, *args, layer_type_list=layer_type_list, pp_layer_offset=pp_layer_offset, **keywords
    )
    if symbols is not None:
        stack.layer_type_list = symbols


def _with_memories(valid: set[str]) -> set[str]:
    return valid | {MEMORY}


_PATTERNS = "megatron.core.models.hybrid.hybrid_layer_allocation"
PATCH = Patch(
    name="memory-symbol",
    reason=f"the symbols of --hybrid-layer-pattern, and the layers that they build, are a fixed list without {MEMORY}",
    removed_when="HybridStack takes symbols and their specs from its configuration",
    targets=(
        Target(_PATTERNS, "Symbols.VALID_LAYERS", _with_memories),
        wrap(_PATTERNS, "Symbols.name_sorted_valid_layer_symbols", lambda original, cls: [*original(cls), MEMORY]),
        wrap("megatron.core.models.hybrid.hybrid_block", "HybridStack.__init__", _build_stack),
    ),
)
