"""Trains new token mixers alone, each to give what the Transformer's own attention gives for the same hidden states.

All other weights are frozen, and the hidden states are always the Transformer's, so that the layers learn side by side
and no error goes from one layer to the next. This is the first stage of HALO and of other conversions of Transformers.

Shape legend: sequences B, tokens T, hidden size D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from linear_moe.conversion.beginnings import Beginning, Start, begin
from linear_moe.conversion.digests import digest, write_digests
from linear_moe.conversion.files import ConversionError, write_weights
from linear_moe.conversion.loading import TIED_WEIGHT
from mom_layers.hf import MomForCausalLM
from mom_layers.hf.mixer import token_mixer
from mom_layers.hf.remote_code import save_remote_code
from mom_layers.hf.sequence import TokenSequence
from mom_layers.route.router import load_balancing_loss

OPEN = 1.278464542761074
"""SiLU(OPEN) = 1: an output gate of this size lets an output pass as it is."""
RIDGE = 1e-3
LEAST_SCALE = 0.05
WARM_UP, LAST = 0.05, 0.1
"""Shares of the steps in which the learning rate grows, and of the learning rate at the end."""


class Alignment:
    """A Transformer, and the mixers that take the place of some of its attention layers.

    Args:
        folder: of the Transformer.
        start: which layers become MoM layers, and their sizes.
        device: to compute on. On a GPU the Transformer is in bfloat16.

    Raises ConversionError for a folder that cannot be used, and where no layer becomes a MoM layer.
    """

    def __init__(self, folder: Path, start: Start, device: torch.device):
        self.model: Beginning = begin(folder, start)
        config = self.model.config
        self.device, self.layers = device, self.model.kinds.of("mom")
        if not self.layers:
            raise ConversionError("no layer becomes a MoM layer: give other --softmax-layers or --mom-layers")
        before = begin(folder, Start(softmax_layers="all"))
        self.transformer = MomForCausalLM(before.config).eval().requires_grad_(False)
        own = {name: before.tensors.read(name) for entry in before.table for name in entry.hf_names}
        missing, unknown = self.transformer.load_state_dict(own, strict=False)
        assert not unknown and set(missing) <= {TIED_WEIGHT}, (missing, unknown)
        self.transformer.tie_weights()
        self.transformer.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        self.mixers = {layer: self._mixer(layer) for layer in self.layers}
        self.topk = config.topk

    def _mixer(self, layer: int) -> torch.nn.Module:
        mixer = token_mixer(self.model.config, layer)
        own = {name: self.model.tensors.read(self._name(layer, name)) for name in mixer.state_dict()}
        mixer.load_state_dict(own)
        return mixer.float().to(self.device).train()

    @staticmethod
    def _name(layer: int, name: str) -> str:
        return f"model.layers.{layer}.attn.{name}"

    def parameters(self) -> list[torch.nn.Parameter]:
        """Of the new mixers."""
        return [parameter for mixer in self.mixers.values() for parameter in mixer.parameters()]

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor, TokenSequence]]:
        """For tokens [B, T]: every new layer's index, its input and the Transformer's output there [B, T, D] each."""
        sequence = TokenSequence(*tokens.shape, 0, tokens.device)
        hidden = self.transformer.model.embeddings(tokens)
        for layer, block in enumerate(self.transformer.model.layers):
            x = block.attn_norm(hidden)
            target, _ = block.attn(x, sequence)
            if layer in self.mixers:
                yield layer, x, target, sequence
            hidden = hidden + target
            out = block.mlp(block.mlp_norm(hidden))
            hidden = hidden + (out[0] if isinstance(out, tuple) else out)

    @torch.no_grad()
    def open_gates(self, tokens: Tensor) -> None:
        """Sets each output gate close to 1, and the size of each output to the Transformer's, both by least squares
        over these tokens [B, T]. The gate is linear in the hidden state: its rows become the best linear map to `OPEN`.
        """
        for layer, x, target, sequence in self.hidden_states(tokens):
            mixer, rows = self.mixers[layer], x.flatten(0, 1).float()
            moments = rows.T @ rows
            moments.diagonal().add_(RIDGE * moments.diagonal().mean())
            row = torch.linalg.solve(moments, rows.sum(0) * OPEN)
            mixer.g_proj.weight.copy_(row.expand_as(mixer.g_proj.weight))
            out, _ = self._forward(mixer, x, sequence)
            scale = (out * target).sum() / out.square().sum().clamp(min=1e-20)
            mixer.o_norm.weight.mul_(scale.clamp(min=LEAST_SCALE))

    def _forward(self, mixer: torch.nn.Module, x: Tensor, sequence: TokenSequence) -> tuple[Tensor, Tensor | None]:
        """The output, and the router's logits, None where there is one memory and no router; both in float32."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            out, logits = mixer(x.float(), sequence)
        return out.float(), None if logits is None else logits.float()

    def backward(self, tokens: Tensor, balance: float) -> dict[int, Tensor]:
        """Adds the gradients of one batch [B, T]. Returns each layer's squared error over the square of its target.

        balance: weight of the router's balancing loss, which is 1 when the memories are balanced.
        """
        errors = {}
        for layer, x, target, sequence in self.hidden_states(tokens):
            with torch.enable_grad():
                out, logits = self._forward(self.mixers[layer], x, sequence)
                target = target.float()
                error = (out - target).square().mean() / target.square().mean()
                loss = error
                if logits is not None:
                    loss = loss + balance * load_balancing_loss(logits, logits.topk(self.topk).indices)
                loss.backward()
            errors[layer] = error.detach()
        return errors

    def save(self, folder: Path, max_shard_size: str | int = "5GB") -> None:
        """Fills a folder with the model: the trained mixers, and the Transformer's other weights as they are."""
        names = [name for entry in self.model.table for name in entry.hf_names]
        described = {name: self.model.tensors.describe(name) for name in names}
        trained = {
            self._name(layer, name): tensor
            for layer, mixer in self.mixers.items()
            for name, tensor in mixer.state_dict().items()
        }
        digests = {}

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for name in names:
                tensor = trained[name] if name in trained else self.model.tensors.read(name)
                tensor = tensor.detach().to("cpu", described[name].dtype).contiguous()
                digests[name] = digest(tensor)
                yield name, tensor

        self.model.config.architectures = ["MomForCausalLM"]
        self.model.config.dtype = described["model.embeddings.weight"].dtype
        self.model.config.save_pretrained(folder)
        save_remote_code(folder)
        write_weights(folder, described, tensors(), max_shard_size)
        write_digests(folder, digests)


class Windows:
    """Random windows of tokens of Megatron's data files.

    Args:
        prefix: of the .bin and .idx files.
        batch, length: B and T of a batch.
        vocabulary: tokens of the model.
        seed: of the draw.

    Raises ConversionError for files that are missing, too short, or of another tokenizer.
    """

    def __init__(self, prefix: Path, batch: int, length: int, vocabulary: int, seed: int):
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise ConversionError(f"--data-path {prefix}: there is no {prefix}{suffix}")
        index = IndexedDataset(str(prefix)).index
        self.tokens = np.memmap(f"{prefix}.bin", dtype=index.dtype, mode="r")
        if len(self.tokens) < length:
            raise ConversionError(f"--data-path {prefix} has {len(self.tokens)} tokens: expected {length} or more")
        if (largest := int(self.tokens[: 1 << 24].max())) >= vocabulary:
            raise ConversionError(f"--data-path {prefix} has the token {largest}, and the model {vocabulary} tokens")
        self.batch, self.length, self.generator = batch, length, np.random.default_rng(seed)

    def draw(self) -> Tensor:
        """Tokens [B, T]."""
        firsts = self.generator.integers(0, len(self.tokens) - self.length + 1, self.batch)
        rows = np.stack([self.tokens[first : first + self.length] for first in firsts])
        return torch.from_numpy(rows.astype(np.int64))


def train(
    alignment: Alignment,
    windows: Windows,
    *,
    steps: int,
    rate: float,
    balance: float,
    say: Callable[[int, dict[int, float]], None],
) -> dict[int, float]:
    """Trains the mixers, and returns the last errors of the layers.

    Args:
        steps: batches.
        rate: the largest learning rate.
        balance: as for :meth:`Alignment.backward`.
        say: called with the step and the layers' errors, ten times or so.

    Raises ConversionError where the error is no number any more.
    """
    optimizer = torch.optim.AdamW(alignment.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    alignment.open_gates(windows.draw().to(alignment.device))
    every, found = max(1, steps // 10), {}
    for step in range(steps):
        grown = min(1.0, (step + 1) / max(1, WARM_UP * steps))
        fallen = LAST + (1 - LAST) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate * grown * fallen
        errors = alignment.backward(windows.draw().to(alignment.device), balance)
        torch.nn.utils.clip_grad_norm_(alignment.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % every == 0 or step == steps - 1:
            found = {layer: error.item() for layer, error in errors.items()}
            if not all(map(math.isfinite, found.values())):
                raise ConversionError(f"the error is no number at step {step}: give a smaller --lr than {rate:g}")
            say(step, found)
    return found
