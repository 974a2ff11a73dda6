"""Mixture-of-Memories as a token mixer for Megatron."""
