"""Evaluation of a Hugging Face folder: an export of this project, or any causal language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from linear_moe.conversion.files import load_tokenizer, read_json
from linear_moe.conversion.loading import load_model, read_model
from linear_moe.evaluation.harness import Backend
from linear_moe.tokens import end_of_document


class ExportBackend(Backend):
    """A model in the Hugging Face format, in one process.

    Args:
        folder: of the model and its tokenizer.
        device: to compute on.
        dtype: to compute in; as stored when None.
        tokenizer: folder of another tokenizer.

    Raises:
        ConversionError: the folder's model or tokenizer cannot be used.
    """

    def __init__(self, folder: Path, device: str, dtype: torch.dtype | None, tokenizer: Path | None = None):
        if read_json(folder / "config.json").get("model_type") == "mom":
            read_model(folder)  # before transformers reads config.json for the tokenizer
        self.tokenizer = load_tokenizer(tokenizer or folder)
        self.model = load_model(folder, dtype, AutoModelForCausalLM, trust_remote_code=False).to(device)
        self.vocabulary = self.model.config.vocab_size
        self.train_length = getattr(self.model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def reduce(
        self, tokens: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]
    ) -> torch.Tensor:
        logits = self.model(tokens.to(self.model.device), use_cache=False).logits
        return function(logits.float()).cpu()

    @torch.inference_mode()
    def generate(self, rows: list[list[int]], limit: int, until: Sequence[str]) -> list[list[int]]:
        longest = max(map(len, rows))
        end = end_of_document(self.tokenizer)
        tokens = torch.tensor([[end] * (longest - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        stops = [stop for stop in until if stop]
        settings = GenerationConfig(
            max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=end, stop_strings=stops or None
        )
        words = {"tokenizer": self.tokenizer} if stops else {}
        output = self.model.generate(tokens, attention_mask=mask, generation_config=settings, **words)
        return output[:, longest:].tolist()
