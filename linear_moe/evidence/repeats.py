"""Tokens of a text that could be recalled from the context, by what occurred before them and how often training saw it.

A token repeats where it ends an n-gram, of two tokens or more, that occurred earlier in the same window (Zoology,
arXiv 2312.04927, analyses language models so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 4  # the longest n-gram that is told apart from longer ones
DISTANCES = (16, 64, 256, 1024, 4096, 16384)  # ends of the classes, the last is open
FREQUENCIES = (1, 10, 100, 1000)  # likewise; the first class are bigrams that training never saw
CHUNK = 1 << 24  # tokens of training text that are sorted at once


@dataclass(frozen=True)
class Repeats:
    """Of every token but a window's first, [W, L] each.

    Attributes:
        longest: 1 where no bigram repeats, else n of the longest n-gram that does, up to LONGEST.
        distance: class of the tokens since the bigram's last occurrence, an index into DISTANCES or one more.
        frequency: class of the bigram's occurrences in the training text, likewise into FREQUENCIES.
    """

    longest: np.ndarray
    distance: np.ndarray
    frequency: np.ndarray


def find_repeats(windows: np.ndarray, vocabulary: int, counts: BigramCounts) -> Repeats:
    """windows [W, L + 1] of token ids."""
    shape = (len(windows), windows.shape[1] - 1)
    longest, distance = np.ones(shape, np.int8), np.zeros(shape, np.int64)
    for index, window in enumerate(windows.astype(np.int64)):
        codes = window
        for n in range(2, LONGEST + 1):
            # the codes of n-grams [L + 2 - n]; the one at i ends at token i + n - 1
            codes = codes[:-1] * vocabulary + window[n - 1 :]
            codes = np.unique(codes, return_inverse=True)[1]
            since = since_last(codes)
            longest[index, n - 2 :][since > 0] = n
            if n == 2:
                distance[index] = since
    bigrams = windows[:, :-1].astype(np.int64) * vocabulary + windows[:, 1:]
    classes = np.searchsorted(DISTANCES, distance, side="right").astype(np.int8)
    frequency = np.searchsorted(FREQUENCIES, counts(bigrams), side="right").astype(np.int8)
    return Repeats(longest, classes, frequency)


def since_last(codes: np.ndarray) -> np.ndarray:
    """[L] how far before every place its code stood last; 0 where the code is new."""
    order = np.argsort(codes, kind="stable")
    since = np.zeros(len(codes), np.int64)
    same = codes[order[1:]] == codes[order[:-1]]
    since[order[1:][same]] = (order[1:] - order[:-1])[same]
    return since


class BigramCounts:
    """How often bigrams of some windows occur in a text.

    Args:
        text: token ids [N] of the training text.
        windows: arrays [W, L + 1] whose bigrams may be looked up.
    """

    def __init__(self, text: np.ndarray, windows: Sequence[np.ndarray], vocabulary: int):
        self.known = np.unique(
            np.concatenate([(w[:, :-1].astype(np.int64) * vocabulary + w[:, 1:]).ravel() for w in windows])
        )
        self.counts = np.zeros(len(self.known), np.int64)
        for start in range(0, len(text) - 1, CHUNK):
            part = np.asarray(text[start : start + CHUNK + 1], np.int64)
            codes, counts = np.unique(part[:-1] * vocabulary + part[1:], return_counts=True)
            place = np.minimum(np.searchsorted(self.known, codes), len(self.known) - 1)
            found = self.known[place] == codes
            self.counts[place[found]] += counts[found]

    def __call__(self, bigrams: np.ndarray) -> np.ndarray:
        """Occurrences of bigrams, given as first token x vocabulary + second."""
        return self.counts[np.searchsorted(self.known, bigrams)]
