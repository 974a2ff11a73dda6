"""A recipe: settings of examples/pretrain_mom_a100.sh, Megatron's arguments, a layout, and a tiny size.

    settings: {HIDDEN: 1024, ...}        variables of the script
    layout: {GPUS: 8, EP: 4}             GPUs that hold one copy of the model or more, and how the model is split
    vocabulary: 32000                    for the table of sizes; a training has its tokenizer's
    arguments: {num-experts: 64, ...}    of Megatron; true stands for a switch
    tiny: {num-experts: 16, ...}         arguments that differ in the tiny size

The pattern of layers is written in parts with counts: "R-R- 3x|RERE*E /*E".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
PATTERN = "hybrid-layer-pattern"
TINY_SETTINGS = {
    "HIDDEN": 64, "FFN": 128, "HEADS": 2, "HEAD_DIM": 16, "ATTENTION_HEADS": 4, "SEQ_LENGTH": 64, "MICRO_BATCH": 4,
    "GLOBAL_BATCH": 8, "TRAIN_ITERS": 60, "LR": 5e-3, "VOCAB": 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What one run needs. settings and arguments are those of the chosen size."""

    name: str
    about: str
    settings: dict[str, object]
    layout: dict[str, int]
    vocabulary: int
    arguments: dict[str, object]

    @property
    def pattern(self) -> str:
        return self.arguments[PATTERN]

    def words(self) -> list[str]:
        """The arguments as words of a command line."""
        words: list[str] = []
        for name, value in self.arguments.items():
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        return words

    def model_words(self) -> list[str]:
        """All arguments of the model, those too that the script makes from the settings."""
        options = {
            "HIDDEN": "hidden-size", "FFN": "ffn-hidden-size", "HEADS": "mom-num-heads", "HEAD_DIM": "mom-head-dim",
            "ATTENTION_HEADS": "num-attention-heads", "SEQ_LENGTH": "seq-length", "MEMORIES": "mom-num-memories",
            "TOPK": "mom-topk",
        }  # fmt: skip
        given = [(options[name], value) for name, value in self.settings.items() if name in options]
        given.append(("max-position-embeddings", self.settings["SEQ_LENGTH"]))
        common = "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope".split()
        return [*common, *(word for name, value in given for word in (f"--{name}", str(value))), *self.words()]


def names() -> list[str]:
    """The recipes' names, in alphabetical order."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def whole_pattern(written: str) -> str:
    """A pattern whose parts may have counts: "2xRE *E" is RERE*E."""
    parts = [re.fullmatch(r"(?:(\d+)x)?(.+)", part) for part in written.split()]
    return "".join(int(part[1] or 1) * part[2] for part in parts)


def read(name: str, *, tiny: bool = False) -> Recipe:
    """The recipe of this name. Raises ValueError for an unknown name."""
    path = FOLDER / f"{name}.yaml"
    if name not in names():
        raise ValueError(f"there is no recipe {name!r}: use one of {', '.join(names())}")
    text = path.read_text()
    content = yaml.safe_load(text)
    arguments = content["arguments"] | (content["tiny"] if tiny else {})
    return Recipe(
        name=name,
        about=" ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")),
        settings=content["settings"] | (TINY_SETTINGS if tiny else {}),
        layout={} if tiny else content["layout"],
        vocabulary=int(TINY_SETTINGS["VOCAB"]) if tiny else content["vocabulary"],
        arguments=arguments | {PATTERN: whole_pattern(arguments[PATTERN])},
    )
