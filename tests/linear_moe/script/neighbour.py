"""Stands for gpt_builders.py and model_provider.py, which Megatron-LM's scripts import from their own folder."""


def provider() -> None:
    """Scripts import this function and do not call it."""
