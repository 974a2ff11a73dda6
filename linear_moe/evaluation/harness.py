"""A language model as lm-evaluation-harness calls it, over any `Backend`: an export, or a Megatron checkpoint.

Text becomes tokens as in training, and every context follows the end-of-document token, as every document does there.

Shape legend: rows B, tokens T, vocabulary V.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows
from tqdm import tqdm

from linear_moe.tokens import document_start, encode_texts, end_of_document

IGNORED = -100
GENERATED_TOKENS = 256  # where a task does not say how many


class EvaluationError(ValueError):
    """A model or a task that cannot be evaluated; the message is for the user."""


class Backend(ABC):
    """A model, perhaps spread over processes that all make the same calls.

    Attributes:
        tokenizer: of transformers.
        vocabulary: V, the rows of the embedding that the tokenizer can name.
        ranks: processes that read different rows (data parallelism).
        rank: this process among them.
        is_first: whether this process prints and writes.
    """

    tokenizer: object
    vocabulary: int
    ranks: int = 1
    rank: int = 0
    is_first: bool = True

    @abstractmethod
    def reduce(
        self, tokens: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
    ) -> torch.Tensor:
        """``function`` of the float32 logits [B, T, V] of tokens [B, T]: a float32 tensor of ``shape``, on the CPU."""

    def gather(self, values: list) -> list[list]:
        """The lists of all ranks, in the order of the ranks."""
        return [values]

    def generate(self, rows: list[list[int]], limit: int, until: Sequence[str]) -> list[list[int]]:
        """Greedy continuations of at most ``limit`` tokens, up to and with an end-of-document token, or the first text
        of ``until``.

        This implementation reads the whole row again for every token. A backend with a cache overrides this function.
        """
        end = end_of_document(self.tokenizer)
        added: list[list[int]] = [[] for _ in rows]
        finished = [False] * len(rows)
        for _ in range(limit):
            if all(flags for rank in self.gather(finished) for flags in rank):
                break
            full = [row + new for row, new in zip(rows, added, strict=True)]
            last = torch.tensor([len(row) - 1 for row in full])
            every = torch.arange(len(full))
            chosen = self.reduce(padded(full), partial(most_probable, every, last), (len(full),))
            for index, token in enumerate(chosen.long().tolist()):
                if finished[index]:
                    continue
                added[index].append(token)
                text = self.tokenizer.decode(added[index])
                finished[index] = token == end or any(stop in text for stop in until)
        return added


class HarnessModel(TemplateLM):
    """What the harness calls.

    Args:
        backend: the model.
        max_length: tokens that the model reads at once; a longer context loses its beginning.
        batch_size: rows side by side on a rank.
        starts_documents: put the end-of-document token before every context.
    """

    def __init__(self, backend: Backend, max_length: int, batch_size: int, starts_documents: bool = True):
        super().__init__()
        self.backend, self.max_length, self.batch_size = backend, max_length, batch_size
        self.tokenizer = backend.tokenizer
        self.start = document_start(self.tokenizer) if starts_documents else []
        if end_of_document(self.tokenizer) is None:
            raise EvaluationError("the tokenizer has no end-of-document token (EOS or SEP), and no text can start")

    @property
    def eot_token_id(self) -> int:
        return end_of_document(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options) -> list[int]:
        return encode_texts(self.tokenizer, [string])[0]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **options) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            if not continuation:
                raise EvaluationError("a task has an empty continuation, which has no probability")
            before = context if context[: len(self.start)] == self.start else self.start + context
            whole = (before + continuation)[-(self.max_length + 1) :]
            kept = min(len(continuation), len(whole) - 1)
            rows.append((whole[:-1], whole[len(whole) - kept :]))
        return self.score(rows, disable_tqdm)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        rows, owner = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for context, continuation in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, 1):
                whole = [*context[: len(context) - len(continuation) + 1], *continuation]
                rows.append((whole[:-1], continuation))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(owner, self.score(rows, disable_tqdm), strict=True):
            sums[number] += value
        return sums

    def score(self, rows: list[tuple[list[int], list[int]]], quiet: bool) -> list[tuple[float, bool]]:
        """For rows (tokens that are read, tokens that the last of them predict): the sum of the predicted tokens' log
        probabilities, and whether every one of them is the most probable token.
        """

        def measure(batch: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
            tokens = padded([read for read, _ in batch])
            targets = torch.full(tokens.shape, IGNORED)
            for index, (read, predicted) in enumerate(batch):
                targets[index, len(read) - len(predicted) : len(read)] = torch.tensor(predicted)
            values = self.backend.reduce(tokens, lambda logits: score_tokens(logits, targets), (len(batch), 2))
            return [(value, right > 0.5) for value, right in values.tolist()]

        return self._spread(rows, lambda row: len(row[0]), measure, "scoring", quiet)

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        rows = []
        for request in requests:
            context, options = request.args
            if options.get("do_sample") and options.get("temperature", 1.0) > 0:
                raise EvaluationError(f"a task samples ({options}), and evaluation here is greedy only")
            limit = options.get("max_gen_toks", GENERATED_TOKENS)
            until = options.get("until") or []
            until = (until,) if isinstance(until, str) else tuple(until)
            room = self.max_length - limit - len(self.start)
            if room < 1:
                raise EvaluationError(
                    f"a task generates {limit} tokens, which leaves no room for a context within "
                    f"--max-length {self.max_length}: give a larger --max-length"
                )
            rows.append((self.start + self.tok_encode(context)[-room:], limit, until))

        def write(batch: list[tuple[list[int], int, tuple[str, ...]]]) -> list[str]:
            limit = max(row[1] for row in batch)
            stops = sorted({stop for row in batch for stop in row[2]})
            texts = []
            together = len({row[1:] for row in batch}) == 1
            added = self.backend.generate([row[0] for row in batch], limit, stops if together else [])
            for tokens, (_, most, until) in zip(added, batch, strict=True):
                tokens = tokens[:most]
                if self.eot_token_id in tokens:
                    tokens = tokens[: tokens.index(self.eot_token_id)]
                text = self.tokenizer.decode(tokens)
                for stop in filter(None, until):
                    text = text.split(stop)[0]
                texts.append(text)
            return texts

        return self._spread(rows, lambda row: len(row[0]), write, "generating", disable_tqdm)

    def _spread(self, rows: list, length: Callable, work: Callable[[list], list], name: str, quiet: bool) -> list:
        """``work`` on batches of rows of about equal length. Every rank takes its rows of each batch, and all ranks get
        all answers, in the order of ``rows``. All ranks call ``work`` equally often, since a model's ranks communicate.
        """
        backend = self.backend
        order = sorted(range(len(rows)), key=lambda index: -length(rows[index]))
        side_by_side = self.batch_size * backend.ranks
        answers: list = [None] * len(rows)
        with tqdm(total=len(rows), desc=name, disable=True if quiet or not backend.is_first else None) as progress:
            for first in range(0, len(order), side_by_side):
                together = order[first : first + side_by_side]
                mine = together[backend.rank :: backend.ranks] or together[:1]
                for rank, values in enumerate(backend.gather(work([rows[index] for index in mine]))):
                    owners = together[rank :: backend.ranks]
                    for index, value in zip(owners, values[: len(owners)], strict=True):
                        answers[index] = value
                progress.update(len(together))
        return answers


def padded(rows: list[list[int]]) -> torch.Tensor:
    """[B, T] tokens, filled up on the right, where a causal model's padding changes nothing."""
    tokens = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return tokens


def most_probable(rows: torch.Tensor, positions: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Numbers of the most probable tokens at ``positions`` [B] of ``rows`` [B] of logits [B, T, V]."""
    return logits[rows, positions].argmax(-1).float()


def score_tokens(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """[B, 2]: the sum of the targets' log probabilities, and 1 where every target is the most probable token.

    Args:
        logits: [B, T, V].
        targets: [B, T], IGNORED at positions that do not count.

    Raises:
        EvaluationError: logits are not finite.
    """
    targets = targets.to(logits.device)
    results = []
    for row, target in zip(logits, targets, strict=True):  # row by row: log probabilities take as much as the logits
        counted = target != IGNORED
        log_probabilities = row[counted].log_softmax(-1)
        chosen = target[counted, None]
        right = (log_probabilities.argmax(-1, keepdim=True) == chosen).all()
        results.append(torch.stack([log_probabilities.gather(1, chosen).sum(), right.float()]))
    values = torch.stack(results)
    if not values.isfinite().all():
        raise EvaluationError("the model's logits are NaN or infinite: try --dtype float32")
    return values
