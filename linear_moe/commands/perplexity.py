"""Perplexity of a text by position: how a model's loss falls along its context, far past the training length.

The command line is linear_moe/commands/arguments/perplexity.py.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from linear_moe.commands import run_command
from linear_moe.commands.arguments.perplexity import REACH, WINDOWS, parse_arguments
from linear_moe.conversion.files import ConversionError, read_json
from linear_moe.conversion.loading import MODEL_TYPES, load_model, read_model
from linear_moe.tokens import document_start, encode_texts
from linear_moe.watching.headless_matplotlib import plt, save
from mom_layers.hf.cache import CACHE_NAME  # importing the package registers the model type

FIRST_LENGTH = 16
POINTS_AN_OCTAVE = 4  # of the picture


class PerplexityError(ValueError):
    """A model or text that cannot be measured; the message is for the user."""


@dataclass(frozen=True)
class Measurement:
    """Losses by position, of several windows.

    Attributes:
        losses: [windows, bins] mean loss of each window between two edges.
        edges: [bins + 1] positions; bin i holds the positions from ``edges[i]`` up to, without, ``edges[i + 1]``.
            At position p the model has read p tokens and predicts the next one.
        tokens_per_second: over all windows.
        state_bytes: of one window's cache at its end; None for a cache without nbytes.
    """

    losses: np.ndarray
    edges: np.ndarray
    tokens_per_second: float
    state_bytes: int | None

    def between(self, first: int, last: int) -> tuple[float, float]:
        """Mean loss of the positions from ``first`` up to ``last``, two of the edges, and its standard error.

        The standard error is over the windows, and NaN for a single window.
        """
        i, j = np.searchsorted(self.edges, (first, last))
        widths = np.diff(self.edges[i : j + 1])
        means = self.losses[:, i:j] @ widths / widths.sum()
        error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
        return float(means.mean()), float(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 when nothing can be measured."""
    args = parse_arguments(argv)
    return run_command("perplexity.py", lambda: run(args), PerplexityError, ConversionError)


def run(args: argparse.Namespace) -> None:
    """Loads, measures, prints and draws. Raises PerplexityError, and ConversionError for a model that is broken."""
    if not (args.load / "config.json").is_file():
        raise PerplexityError(f"--load {args.load} has no config.json: expected an export in the Hugging Face format")
    trust = {"trust_remote_code": args.trust_remote_code}  # without this argument transformers asks standard input
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    if read_json(args.load / "config.json").get("model_type") in MODEL_TYPES:
        read_model(args.load)  # before transformers reads config.json for the tokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.load, **trust)
        model = load_model(args.load, dtype, AutoModelForCausalLM, **trust)
    except (OSError, ConversionError):
        raise
    except Exception as error:  # any of transformers' own
        if "trust_remote_code" in str(error):
            raise PerplexityError(f"{args.load} brings code of its own along: --trust-remote-code runs that") from error
        raise PerplexityError(f"{args.load} cannot be loaded: {' '.join(str(error).split())}") from error
    model = model.to(args.device)
    train_length = args.train_length or model.config.max_position_embeddings

    start = [] if args.no_document_start else document_start(tokenizer)
    texts = [_encode(tokenizer, path, model.config.vocab_size, start) for path in args.text]
    longest = max(len(text) for text in texts) - 1
    max_length = args.max_length or default_length(train_length, longest)
    if not FIRST_LENGTH <= max_length <= longest:
        raise PerplexityError(
            f"the longest text has {longest + 1} tokens: windows of {max_length} need one token more than that "
            f"(and windows have at least {FIRST_LENGTH})"
        )
    windows = cut_windows(texts, max_length, args.stride or max_length, args.max_windows)
    lengths = sorted({min(n, max_length) for n in args.lengths or _powers_of_two(max_length)} | {max_length})
    edges = bin_edges(max_length, [*lengths, min(train_length, max_length)])
    measurement = measure(model, windows, edges, args.chunk_size, args.batch_size)

    print(table(measurement, lengths, train_length))
    state = "" if measurement.state_bytes is None else f", {measurement.state_bytes:,} bytes of state a window"
    print(f"{len(windows)} windows of {max_length} tokens, {measurement.tokens_per_second:,.0f} tokens/s{state}")
    draw(measurement, train_length, args.load.name, args.output)
    print(args.output)


def default_length(train_length: int, longest: int) -> int:
    """Length of the windows where the command line says none: `REACH` training lengths, or less, so that the text has
    `WINDOWS` windows: the losses of a single window are those of its text. Two training lengths at least, where the
    text has as many tokens.
    """
    return min(REACH * train_length, longest, max(longest // WINDOWS, 2 * train_length))


def cut_windows(texts: list[torch.Tensor], length: int, stride: int, limit: int | None = None) -> list[torch.Tensor]:
    """All windows [length + 1] that start at a multiple of ``stride``; at most ``limit``, spread over the texts."""
    windows = [text[s : s + length + 1] for text in texts for s in range(0, len(text) - length, stride)]
    if limit is not None and limit < len(windows):
        windows = [windows[i * len(windows) // limit] for i in range(limit)]
    return windows


def bin_edges(max_length: int, wanted: Sequence[int]) -> np.ndarray:
    """0, then POINTS_AN_OCTAVE for every doubling from FIRST_LENGTH to ``max_length``, and all the ``wanted`` ones."""
    steps = range(math.ceil(POINTS_AN_OCTAVE * math.log2(max_length / FIRST_LENGTH)) + 1)
    spread = {round(FIRST_LENGTH * 2 ** (step / POINTS_AN_OCTAVE)) for step in steps}
    return np.array(sorted(n for n in {0, max_length, *wanted, *spread} if n <= max_length))


@torch.inference_mode()
def measure(
    model: PreTrainedModel, windows: list[torch.Tensor], edges: np.ndarray, chunk_size: int = 512, batch_size: int = 1
) -> Measurement:
    """Loss of every window in every bin. Only the model's cache is kept from piece to piece.

    Args:
        windows: token numbers, [length + 1] each.
        edges: of the bins, from 0 to length.
    """
    length = len(windows[0]) - 1
    totals = torch.zeros(len(windows), len(edges) - 1, dtype=torch.float64)
    bin_of_position = torch.from_numpy(np.searchsorted(edges, np.arange(length), side="right") - 1)
    state_bytes, start = None, time.perf_counter()
    with tqdm(total=len(windows) * length, unit=" tokens", unit_scale=True, disable=None) as progress:
        for first in range(0, len(windows), batch_size):
            batch = torch.stack(windows[first : first + batch_size])
            rows = totals[first : first + batch_size]
            for position, losses, cache in stream_losses(model, batch, chunk_size):
                rows.index_add_(1, bin_of_position[position : position + losses.shape[1]], losses.double().cpu())
                progress.update(losses.numel())
                if hasattr(cache, "nbytes"):
                    state_bytes = cache.nbytes // len(batch)
    speed = len(windows) * length / (time.perf_counter() - start)
    if not totals.isfinite().all():
        raise PerplexityError("the model's loss is not finite: try --dtype float32")
    return Measurement(totals.numpy() / np.diff(edges), edges, speed, state_bytes)


def stream_losses(
    model: PreTrainedModel, tokens: torch.Tensor, chunk_size: int
) -> Iterator[tuple[int, torch.Tensor, object]]:
    """tokens [B, length + 1]. Yields the first position of each piece, its losses [B, piece] and the cache after it."""
    tokens = tokens.to(model.device)
    cache = None
    for position in range(0, tokens.shape[1] - 1, chunk_size):
        targets = tokens[:, position + 1 : position + 1 + chunk_size]
        inputs = tokens[:, position : position + targets.shape[1]]
        out = model(inputs, use_cache=True, return_dict=True, **{CACHE_NAME: cache})
        cache = out[CACHE_NAME]
        yield position, F.cross_entropy(out.logits.float().transpose(1, 2), targets, reduction="none"), cache


def table(measurement: Measurement, lengths: list[int], train_length: int) -> str:
    """One row for the positions up to each length, and where the table passes the training length."""
    lines = [f"{'positions':>19}  {'loss':>8}  {'+-':>7}  {'perplexity':>10}  {'training lengths':>16}"]
    for first, last in zip([0, *lengths], lengths, strict=False):
        loss, error = measurement.between(first, last)
        positions = f"{first} to {last - 1}"
        shown = "" if math.isnan(error) else f"{error:.4f}"
        perplexity = math.exp(min(loss, 700))
        lines.append(f"{positions:>19}  {loss:8.4f}  {shown:>7}  {perplexity:10.3f}  {last / train_length:16.2f}")
    end = min(train_length, lengths[-1])
    lines.append(f"within the training length of {train_length}: {measurement.between(0, end)[0]:.4f}")
    if lengths[-1] > train_length:
        lines.append(f"past it, to {lengths[-1]}: {measurement.between(train_length, lengths[-1])[0]:.4f}")
    return "\n".join(lines)


def draw(measurement: Measurement, train_length: int, name: str, path: Path) -> None:
    """Loss against position, with its standard error over the windows, and the training length."""
    edges = measurement.edges
    points = [measurement.between(first, last) for first, last in zip(edges[:-1], edges[1:], strict=True)]
    mean, error = np.array(points).T
    middle = np.sqrt(np.maximum(edges[:-1], edges[1:] / 4) * edges[1:])
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    axes.plot(middle, mean, "o-", color="tab:blue", markersize=4, label="loss")
    if not np.isnan(error).any():
        label = f"standard error over {len(measurement.losses)} windows"
        axes.fill_between(middle, mean - error, mean + error, color="tab:blue", alpha=0.2, linewidth=0, label=label)
    if train_length <= edges[-1]:
        axes.axvline(train_length, color="0.2", linestyle="--", label=f"training length, {train_length} tokens")
    axes.set(title=f"Loss by position: {name}", xlabel="tokens read before", ylabel="loss (nats per token)")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1024 else f"{x / 1024:g}k")
    right = axes.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-12))))
    right.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def _encode(tokenizer, path: Path, vocab_size: int, start: list[int]) -> torch.Tensor:
    """Token ids of a file, with the tokens ``start`` before the text's own."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PerplexityError(f"--text {path} is not UTF-8: {error}") from error
    tokens = torch.tensor(start + encode_texts(tokenizer, [text])[0], dtype=torch.long)
    if len(tokens) and tokens.max() >= vocab_size:
        raise PerplexityError(f"the tokenizer makes token {tokens.max()}, the model's vocabulary has {vocab_size}")
    return tokens


def _powers_of_two(max_length: int) -> list[int]:
    return [2**i for i in range(int(math.log2(FIRST_LENGTH)), int(math.log2(max_length)) + 1)]
