"""Symbols of a model's layers, as --hybrid-layer-pattern writes them. Nothing here imports PyTorch or Megatron."""

from __future__ import annotations

MEMORY = "R"
"""The layer that --token-mixer names: memories. Megatron has no such symbol (`linear_moe.layer.memory_symbol`)."""
GATED_DELTA_NET = "G"
MIXERS = {
    MEMORY: "memories",
    GATED_DELTA_NET: "Megatron's gated delta net",
    "M": "Mamba",
    "*": "softmax attention",
    "+": "multi-latent attention",
    "D": "sparse attention",
}
MLPS = {"-": "MLP", "E": "experts"}
SYMBOLS = MIXERS | MLPS
SOFTMAX = "*+D"
"""Symbols of softmax attention of all kinds."""
STAGE, PREDICTION = "|", "/"
"""What stands between pipeline stages, and before the layers of each step of multi-token prediction."""


def main_layers(pattern: str) -> str:
    """The symbols of the decoder's layers, without borders of stages and without multi-token prediction."""
    return pattern.split(PREDICTION)[0].replace(STAGE, "")


def prediction_layers(pattern: str) -> tuple[str, int]:
    """The symbols of one step of multi-token prediction, and the number of steps: ("", 0) where there are none."""
    steps = [step for step in pattern.split(PREDICTION)[1:] if step]
    return (steps[0], len(steps)) if steps else ("", 0)


def pairs(layers: str) -> list[str] | None:
    """The symbols two by two, a mixer and an MLP, as a layer of a GPTModel has them; None for another order."""
    two = [layers[first : first + 2] for first in range(0, len(layers), 2)]
    return two if all(len(pair) == 2 and pair[0] in MIXERS and pair[1] in MLPS for pair in two) else None


def asks_for_memories(words: list[str]) -> bool:
    """Whether the words of a command line have a pattern with the symbol `MEMORY`."""
    names = ("--hybrid-layer-pattern", "--hybrid-override-pattern", "--mtp-hybrid-override-pattern")
    given = [after for word, after in zip(words, words[1:], strict=False) if word in names]
    given += [word.partition("=")[2] for word in words if word.partition("=")[0] in names]
    return any(MEMORY in pattern for pattern in given)
