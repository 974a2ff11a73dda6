"""Mixture-of-Memories layers in PyTorch and Triton."""

from mom_layers.mom import MixtureOfMemories
from mom_layers.rules import MemoryRule, get_rule, register_rule, rule_names
from mom_layers.state import MemoryState

__all__ = ["MemoryRule", "MemoryState", "MixtureOfMemories", "get_rule", "register_rule", "rule_names"]
