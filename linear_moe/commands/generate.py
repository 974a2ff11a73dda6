"""Writes text with a Mixture-of-Memories model: an export in the Hugging Face format, or a Megatron checkpoint.

The command line is linear_moe/commands/arguments/generate.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer, set_seed
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from linear_moe.commands import convert_to_hf, run_command
from linear_moe.commands.arguments.generate import parse_arguments
from linear_moe.conversion.config import DTYPES
from linear_moe.conversion.files import ConversionError, load_tokenizer, read_json, tokenizer_files
from linear_moe.conversion.loading import MODEL_TYPES, load_model, read_model
from linear_moe.temporary import temporary_folder
from linear_moe.tokens import document_start, encode_texts, end_of_document
from mom_layers.hf.cache import CACHE_NAME


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0, or 1 for a model or prompt that cannot be used."""
    args = parse_arguments(argv)
    return run_command("generate.py", lambda: generate(args), ConversionError)


@torch.inference_mode()
def generate(args: argparse.Namespace) -> None:
    """Prints the continuation of the prompts, and the speed on stderr.

    Raises:
        ConversionError: the model cannot be read, has no tokenizer, or there is no prompt.
    """
    prompts = read_prompts(args)
    with model_folder(args) as folder:
        read_model(folder)  # before transformers reads config.json for the tokenizer
        tokenizer = load_tokenizer(find_tokenizer(args, folder))
        logging.disable_progress_bar()
        model = load_model(folder, DTYPES.get(args.dtype))
    model = model.to(args.device)
    start = [] if args.no_document_start else document_start(tokenizer)
    encoded = encode(tokenizer, prompts, model.config.vocab_size, start)
    settings = generation_config(args, tokenizer)
    ids, mask = (tensor.to(args.device) for tensor in pad_left(encoded, settings.pad_token_id))
    if args.seed is not None:
        set_seed(args.seed)

    one = TextStreamer(tokenizer, skip_prompt=args.skip_prompt, skip_special_tokens=True) if len(prompts) == 1 else None
    streamer = Stopwatch(one)
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        streamer=streamer,
        logits_processor=LogitsProcessorList([RefuseNonFinite()]),
    )
    added = [_until_end(tokens, settings) for tokens in output.sequences[:, ids.shape[1] :].tolist()]
    if one is None:
        for index, (start, end) in enumerate(zip(encoded, added, strict=True)):
            tokens = end if args.skip_prompt else start + end
            print(f"[{index}] {tokenizer.decode(tokens, skip_special_tokens=True)}")
    read, written = sum(map(len, encoded)), sum(map(len, added))
    print(streamer.report(read, written, len(prompts), output[CACHE_NAME].nbytes), file=sys.stderr)


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of the command line, of files, or of standard input."""
    if args.prompt:
        return args.prompt
    try:
        files = args.prompt_file or []
        texts = [path.read_text(encoding="utf-8") for path in files] if files else [sys.stdin.read()]
    except UnicodeDecodeError as error:
        raise ConversionError(f"the prompt is not UTF-8: {error}") from error
    if args.lines:
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
        if not texts:
            raise ConversionError("--lines: there is no line with text; expected a prompt on every line")
    return [text.removesuffix("\n") for text in texts]


@contextmanager
def model_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The folder of an export; for a Megatron checkpoint, a temporary folder with its export."""
    if (args.load / "config.json").is_file():
        if read_json(args.load / "config.json").get("model_type") not in MODEL_TYPES:
            raise ConversionError(
                f"--load {args.load} is not a Mixture-of-Memories model: expected model_type mom in its config.json"
            )
        if args.iteration is not None:
            raise ConversionError(f"--iteration {args.iteration}: --load {args.load} is an export, not checkpoints")
        yield args.load
        return
    with temporary_folder(Path(tempfile.gettempdir(), "mom-generate")) as temporary:
        command = ["--load", str(args.load), "--save", str(temporary / "export")]
        command += ["--iteration", str(args.iteration)] if args.iteration is not None else []
        command += ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
        command += ["--trust-checkpoint"] if args.trust_checkpoint else []
        convert_to_hf.convert(convert_to_hf.parse_arguments(command))
        yield temporary / "export"


def find_tokenizer(args: argparse.Namespace, folder: Path) -> Path:
    if args.tokenizer is None and not tokenizer_files(folder):
        raise ConversionError(f"--load {args.load} has no tokenizer: give --tokenizer")
    return args.tokenizer or folder


def encode(tokenizer, prompts: list[str], vocab_size: int, start: list[int]) -> list[list[int]]:
    """Token ids of every prompt, with the tokens ``start`` before the text's own."""
    encoded = [start + ids for ids in encode_texts(tokenizer, prompts)]
    if not all(encoded):
        raise ConversionError("the prompt is empty, and no end-of-document token stands before it: give a text")
    largest = max(map(max, encoded))
    if largest >= vocab_size:
        raise ConversionError(
            f"the tokenizer makes token {largest}, the model's vocabulary has {vocab_size}: give its --tokenizer"
        )
    return encoded


def pad_left(encoded: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T], and a mask [B, T] that is 0 at padding."""
    length = max(map(len, encoded))
    ids = [[pad] * (length - len(tokens)) + tokens for tokens in encoded]
    mask = [[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in encoded]
    return torch.tensor(ids), torch.tensor(mask)


def generation_config(args: argparse.Namespace, tokenizer) -> GenerationConfig:
    sampling = {} if args.greedy else {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=not args.greedy,
        eos_token_id=None if args.ignore_eos else end_of_document(tokenizer),
        pad_token_id=next(id for id in (tokenizer.pad_token_id, end_of_document(tokenizer), 0) if id is not None),
        return_dict_in_generate=True,
        **sampling,
    )


def _until_end(tokens: list[int], settings: GenerationConfig) -> list[int]:
    """The tokens up to and with the token that ends the text."""
    return tokens[: tokens.index(settings.eos_token_id) + 1] if settings.eos_token_id in tokens else tokens


class RefuseNonFinite(LogitsProcessor):
    """Raises ConversionError for logits that are not finite: sampling from NaN is undefined."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not scores.isfinite().all():
            raise ConversionError("the model's logits are NaN or infinite: try --dtype float32")
        return scores


@dataclass
class Stopwatch(BaseStreamer):
    """Measures the speed of generation, and passes the tokens on to another streamer.

    Attributes:
        streamer: prints the tokens; None prints nothing.
    """

    streamer: BaseStreamer | None

    def __post_init__(self):
        self._started = self._first = self._last = 0.0
        self._steps = -1  # the first call brings the prompt

    def put(self, value: torch.Tensor) -> None:
        now = time.perf_counter()
        self._steps += 1
        if self._steps == 0:
            self._started = now
        elif self._steps == 1:
            self._first = now
        self._last = now
        if self.streamer is not None:
            self.streamer.put(value)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()

    def report(self, prompt_tokens: int, new_tokens: int, batch: int, state_bytes: int) -> str:
        """One line. Tokens a second count the whole batch. The prompt's time ends with the first token."""
        reading = self._first - self._started
        speed = batch * (self._steps - 1) / (self._last - self._first) if self._steps > 1 else float("nan")
        return (
            f"prompt: {prompt_tokens} tokens in {reading:.2f} s ({prompt_tokens / reading:.1f} tokens/s); "
            f"generated: {new_tokens} tokens, {speed:.1f} tokens/s; state: {state_bytes} bytes"
            + (f" for a batch of {batch}" if batch > 1 else "")
        )
