"""Windows of the held-out text, and what a model's losses of their tokens say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from linear_moe.evidence.repeats import DISTANCES, FREQUENCIES, LONGEST, BigramCounts, Repeats, find_repeats
from linear_moe.temporary import replaced_file

FIRST_POSITION = 16  # end of the first bin of positions
POINTS_AN_OCTAVE = 2


def token_file(prefix: Path, facts: dict) -> np.ndarray:
    """The token ids of a data set that tools/preprocess_data.py wrote. facts: of the data set, from its JSON file."""
    path = Path(f"{prefix}.bin")
    width = path.stat().st_size // facts["tokens"]
    return np.memmap(path, {2: np.uint16, 4: np.int32}[width], mode="r")


def cut_windows(tokens: np.ndarray, length: int, most_tokens: int) -> np.ndarray:
    """[W, length + 1]: as many windows as do not overlap, but at most ``most_tokens`` in all, spread over the text.

    Raises ValueError where the text is shorter than a window.
    """
    count = min((len(tokens) - 1) // length, max(1, most_tokens // length))
    if count < 1:
        raise ValueError(
            f"the held-out text has {len(tokens)} tokens, and a window of {length} needs one more: hold out more, or "
            "measure at shorter lengths"
        )
    starts = np.linspace(0, len(tokens) - 1 - length, count).astype(np.int64)
    return np.stack([tokens[start : start + length + 1] for start in starts])


def bytes_of_tokens(tokenizer: Path) -> np.ndarray:
    """[vocabulary] bytes of text that every token stands for, of a byte-level tokenizer; 0 for special tokens."""
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    special = {token["id"] for token in content["added_tokens"]}
    sizes = np.zeros(1 + max([*vocabulary.values(), *special]), np.int64)
    for token, number in vocabulary.items():  # a character stands for a byte
        sizes[number] = 0 if number in special else len(token)
    return sizes


@dataclass(frozen=True)
class HeldOut:
    """Windows of one length, and what their tokens are.

    Attributes:
        path: file of the windows.
        length: tokens of a window that have a loss.
        text_bytes: of these tokens, over all windows.
        repeats: of every such token.
    """

    path: Path
    length: int
    text_bytes: int
    repeats: Repeats


def prepare(
    folder: Path, training: np.ndarray, held_out: np.ndarray, tokenizer: Path, lengths: Sequence[int], most_tokens: int
) -> list[HeldOut]:
    """Cuts windows of every length into files of a folder, and finds out what their tokens are."""
    sizes = bytes_of_tokens(tokenizer)
    windows = {length: cut_windows(held_out, length, most_tokens) for length in sorted(set(lengths))}
    counts = BigramCounts(training, list(windows.values()), len(sizes))
    found = []
    for length, tokens in windows.items():
        # Runs beside this one may read the same windows, or have other windows of the same length.
        path = folder / f"windows_{len(tokens)}x{length}.npy"
        with replaced_file(path) as partial, partial.open("wb") as file:
            np.save(file, tokens)
        text_bytes = int(sizes[tokens[:, 1:].astype(np.int64)].sum())
        found.append(HeldOut(path, length, text_bytes, find_repeats(tokens, len(sizes), counts)))
    return found


def summary(losses: np.ndarray, held_out: HeldOut) -> dict[str, float]:
    """Bits per byte of the text, mean loss in nats, and the means over repeating tokens and over all others.

    losses: [W, L] in nats.
    """
    repeats = held_out.repeats.longest > 1
    return {
        "bits_per_byte": float(losses.sum(dtype=np.float64)) / math.log(2) / held_out.text_bytes,
        "loss": float(losses.mean(dtype=np.float64)),
        "repeating_loss": float(losses[repeats].mean(dtype=np.float64)),
        "other_loss": float(losses[~repeats].mean(dtype=np.float64)),
        "repeating_share": float(repeats.mean()),
    }


def by_position(losses: np.ndarray) -> Iterator[tuple[int, int, float, float]]:
    """(first position, end, mean loss, standard error over the windows) of bins that grow with the position."""
    length = losses.shape[1]
    octaves = math.ceil(POINTS_AN_OCTAVE * math.log2(max(length / FIRST_POSITION, 1)))
    ends = {min(length, round(FIRST_POSITION * 2 ** (i / POINTS_AN_OCTAVE))) for i in range(octaves + 1)}
    edges = [0, *sorted(ends | {length})]
    for first, end in zip(edges[:-1], edges[1:], strict=True):
        means = losses[:, first:end].mean(1, dtype=np.float64)
        error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        yield first, end, float(means.mean()), float(error)


def by_repeat(losses: np.ndarray, repeats: Repeats) -> Iterator[tuple[int, int, int, int, float]]:
    """(longest repeating n-gram, class of distance, class of frequency, tokens, mean loss) of every class with a token.

    The distance of a token that repeats nothing is -1.
    """
    distances = np.where(repeats.longest > 1, repeats.distance, -1).astype(np.int64) + 1
    shape = (LONGEST + 1, len(DISTANCES) + 2, len(FREQUENCIES) + 1)
    classes = repeats.longest.astype(np.int64), distances, repeats.frequency.astype(np.int64)
    code = np.ravel_multi_index(classes, shape)
    size = math.prod(shape)
    tokens = np.bincount(code.ravel(), minlength=size)
    totals = np.bincount(code.ravel(), losses.ravel().astype(np.float64), minlength=size)
    for index in np.flatnonzero(tokens):
        longest, distance, frequency = np.unravel_index(index, shape)
        yield int(longest), int(distance) - 1, int(frequency), int(tokens[index]), float(totals[index] / tokens[index])
