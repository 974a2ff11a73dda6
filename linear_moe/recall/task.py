"""Multi-query associative recall (MQAR, Zoology, arXiv 2312.04927), drawn on the device that trains.

A sequence is ``k1 v1 k2 v2 ... kP vP``, then blanks among which every key appears once more. At that second appearance
the model must name the key's value. The gap from the pairs to a query has a power-law distribution, as in Zoology.

Shape legend: sequences B, tokens T, queries Q of a whole batch, numbers of pairs N, most pairs of a sequence P.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from linear_moe.recall.names import MOST_SEEDS

BLANK = 0
GAP_POWER = 0.01  # Zoology's: the probability of a gap g is proportional to g ** (GAP_POWER - 1)
HELD_OUT_SEED = MOST_SEEDS  # added to a seed for the sequences that no model trains on


@dataclass(frozen=True)
class Task:
    """What the sequences look like.

    Attributes:
        vocabulary: token numbers; 0 is the blank, keys come from the lower half and values from the upper half.
        length: T.
        pairs: the numbers of pairs, each in an equal share of the sequences of a batch.
        batch: B.

    Raises:
        ValueError: sizes that do not fit together.
    """

    vocabulary: int = 1024
    length: int = 256
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    batch: int = 80

    def __post_init__(self):
        if not self.pairs or min(self.pairs) < 1:
            raise ValueError(f"pairs {list(self.pairs)}: expected numbers of at least 1")
        most = max(self.pairs)
        if self.length % 2 or self.length < 4 * most:
            raise ValueError(
                f"length {self.length}: expected an even number of tokens, and at least four a pair: {4 * most} for "
                f"pairs {list(self.pairs)}"
            )
        if self.vocabulary % 2 or self.vocabulary // 2 - 1 < most:
            raise ValueError(
                f"vocabulary {self.vocabulary}: expected an even number, and at least {2 * most + 2} for {most} pairs"
            )
        if self.batch < 1 or self.batch % len(self.pairs):
            raise ValueError(
                f"batch {self.batch}: expected a multiple of {len(self.pairs)}, the count of the numbers of pairs"
            )


class Batch(NamedTuple):
    """tokens: [B, T]. queries: [Q] places in the flattened tokens. targets: [Q] the values to name there."""

    tokens: torch.Tensor
    queries: torch.Tensor
    targets: torch.Tensor


class Sampler:
    """Draws batches on a device; the same seed gives the same batches on devices of one kind.

    Attributes:
        pairs_of_query: [Q] index into ``task.pairs`` of every query's sequence, the same for all batches.
    """

    def __init__(self, task: Task, device: torch.device | str, seed: int):
        self.task = task
        self.generator = torch.Generator(device).manual_seed(seed)
        most, share = max(task.pairs), task.batch // len(task.pairs)
        kinds = torch.arange(len(task.pairs)).repeat_interleave(share)  # [B]
        pairs = torch.tensor(task.pairs)[kinds][:, None]  # [B, 1]
        pair = torch.arange(most)
        real = pair < pairs  # [B, P]; what lies beyond a sequence's pairs goes to a column T, which is dropped
        spaces = torch.arange(task.length // 2)
        log_gap = (GAP_POWER - 1) * (spaces + 1.0).log()
        log_gap = torch.where(spaces < task.length // 2 - pairs, log_gap, -torch.inf)  # [B, T / 2]
        first = task.length * torch.arange(task.batch)[:, None]
        constants = {
            "_pairs": pairs,
            "_real": real,
            "_chosen": real.flatten().nonzero().flatten(),
            "_log_gap": log_gap,
            "_key_place": torch.where(real, 2 * pair, task.length),
            "_value_place": torch.where(real, 2 * pair + 1, task.length),
            "_first": first,
            "pairs_of_query": kinds[:, None].expand(-1, most)[real],
        }
        for name, value in constants.items():
            setattr(self, name, value.to(device))

    def draw(self) -> Batch:
        """The next batch. Keys, values and places of queries are drawn without replacement; no wait for the device."""
        task, half, most = self.task, self.task.vocabulary // 2, max(self.task.pairs)
        keys = 1 + self._uniform(half - 1).topk(most).indices  # [B, P]
        values = half + self._uniform(task.vocabulary - half).topk(most).indices
        # The largest of log p + Gumbel noise are a sample without replacement, in the order of drawing.
        noise = -self._uniform(task.length // 2).clamp(min=1e-20).log()
        gaps = (self._log_gap - noise.clamp(min=1e-20).log()).topk(most).indices
        places = 2 * self._pairs + 2 * gaps
        tokens = torch.full((task.batch, task.length + 1), BLANK, dtype=torch.long, device=keys.device)
        tokens.scatter_(1, self._key_place, keys).scatter_(1, self._value_place, values)
        tokens.scatter_(1, torch.where(self._real, places, task.length), keys)
        queries = (self._first + places).flatten()[self._chosen]
        return Batch(tokens[:, : task.length].contiguous(), queries, values.flatten()[self._chosen])

    def fill(self, batch: Batch) -> None:
        """Writes the next batch over an earlier one, which CUDA graphs read."""
        for old, new in zip(batch, self.draw(), strict=True):
            old.copy_(new)

    def _uniform(self, columns: int) -> torch.Tensor:
        return torch.rand(self.task.batch, columns, generator=self.generator, device=self.generator.device)
