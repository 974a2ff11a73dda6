"""Mixture-of-Memories as a token mixer for Megatron."""

__version__ = "0.1.0"
