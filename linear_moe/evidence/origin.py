"""Where measured rows come from: the commands that trained the models, as a user repeats these commands."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from linear_moe.evidence.report import line
from linear_moe.recall import records

OF_ONE_RUN = {"--commit": 1, "--time-limit": 1, "--measure-seconds": 1, "--data": 1, "--fit-time": 0}
"""Options that say where and how long a run was made: {option: its values}. A repeated run needs none of them."""


def origin_table(rows: Sequence[records.Row]) -> str:
    """Every command with commit, device and version of torch, and the number of models that it trained."""
    tokens: dict[str, int] = {}  # --fit-time chose one number for a command, and --equal-time only larger ones
    for row in rows:
        if "tokens" in row:
            command, here = row["command"], int(row["tokens"])
            tokens[command] = min(here, tokens.get(command, here))
    counts = Counter(
        (repeatable(row["command"], tokens.get(row["command"])), row["commit"], row["device"], row["torch"])
        for row in rows
    )
    lines = [line(["command", "commit", "device", "torch", "models"]), line(["---"] * 5)]
    return "\n".join([*lines, *(line([f"`{key[0]}`", *key[1:], count]) for key, count in counts.items())])


def repeatable(command: str, tokens: int | None = None) -> str:
    """A recorded command as a user repeats it.

    The result starts with `python`, writes into runs/ with the name of the tool, and has none of the options
    OF_ONE_RUN. Where `--fit-time` chose the number of tokens, `--tokens` is ``tokens``, the number that was chosen.
    """
    tool, *words = shlex.split(command)
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    fits = "--fit-time" in words and tokens is not None
    replaced = {"--output": f"runs/{PurePosixPath(tool).stem}"} | ({"--tokens": str(tokens)} if fits else {})
    if fits and "--tokens" not in words:
        words += ["--tokens", ""]
    kept, left = ["python", tool], iter(words)
    for word in left:
        if word in OF_ONE_RUN:
            for _ in range(OF_ONE_RUN[word]):
                next(left)
        elif word in replaced:
            next(left)
            kept += [word, replaced[word]]
        else:
            kept.append(word)
    return shlex.join(kept)
