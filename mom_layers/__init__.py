"""Mixture-of-Memories layers, and layers of one memory, in PyTorch and Triton."""

from mom_layers.layer import LinearAttentionLayer, MixtureOfMemories
from mom_layers.recur.rules import MemoryRule, RawGate, get_rule, register_rule, rule_from_equation, rule_names
from mom_layers.state import MemoryState

__all__ = [
    "LinearAttentionLayer",
    "MemoryRule",
    "MemoryState",
    "MixtureOfMemories",
    "RawGate",
    "get_rule",
    "register_rule",
    "rule_from_equation",
    "rule_names",
]
__version__ = "0.1.0"
