"""The small language models: an embedding, layers of one kind of mixer, and the embedding again as the output layer.

Shape legend: sequences B, tokens T, hidden size D, heads H, key size K, value size V, queries Q.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from linear_moe.recall.task import Batch
from mom_layers import MixtureOfMemories
from mom_layers.route.router import load_balancing_loss, route

SOFTMAX = "softmax"
SHORT_RULES = {"gated_deltanet": "GDN", "gla": "GLA"}
ROTARY_BASE = 10000.0
INIT_STD = 0.02
TEXT_CONV = 4
"""Width of the convolution over the text of models that have one."""
CONV = 4
"""Width of the memories' own convolutions, of models without a convolution over the text."""


@dataclass(frozen=True)
class Mixer:
    """A token mixer. One memory, chosen by every token and without a shared memory, is the update rule alone.

    Attributes:
        rule: name of a memory update rule, or "softmax".
        heads: H.
        key_size: K.
        value_size: V.
        memories: M, without the shared memory.
        topk: memories that a token goes to.
        shared: add the memory that every token goes to.
        text_conv: width of the convolution over the text; 0 for none. The memories then have no convolutions of
            their own.
    """

    rule: str = "gated_deltanet"
    heads: int = 1
    key_size: int = 16
    value_size: int = 16
    memories: int = 1
    topk: int = 1
    shared: bool = False
    text_conv: int = 0

    @property
    def alone(self) -> Mixer:
        """The update rule alone, with the heads and sizes of one memory, and convolutions on its q, k and v.

        Those convolutions run over the text, as one memory gets every token.
        """
        return replace(self, memories=1, topk=1, shared=False, text_conv=0)

    @property
    def all_memories(self) -> int:
        """Memories with the shared one."""
        return self.memories + int(self.shared)

    @property
    def state(self) -> int:
        """Numbers that a layer keeps of a sequence; 0 for softmax, which keeps all keys and values."""
        return 0 if self.rule == SOFTMAX else self.all_memories * self.heads * self.key_size * self.value_size

    @property
    def name(self) -> str:
        short = SHORT_RULES.get(self.rule, self.rule)
        sizes = f"{self.heads} x {self.key_size} x {self.value_size}"
        end = " text conv" if self.text_conv else ""
        if self.memories == 1:
            return f"{short} {sizes}{end}"
        return f"MoM({short}) {self.memories}/{self.topk}{' shared' if self.shared else ''} {sizes}{end}"


@dataclass(frozen=True)
class Shape:
    """Of every model: layers, hidden size D, and the width of the SwiGLU layers (0: none, as in Zoology)."""

    layers: int = 2
    hidden: int = 128
    mlp: int = 0


class Memories(nn.Module):
    """A Mixture-of-Memories layer that also gives its balancing loss (None for a single memory)."""

    def __init__(self, mixer: Mixer, hidden: int):
        super().__init__()
        self.layer = MixtureOfMemories(
            hidden_size=hidden,
            num_heads=mixer.heads,
            head_dim=mixer.key_size,
            expand_v=mixer.value_size / mixer.key_size,
            num_memories=mixer.memories,
            topk=mixer.topk,
            shared_memory=mixer.shared,
            rule=mixer.rule,
            text_conv=mixer.text_conv,
            conv_kernel=1 if mixer.text_conv else CONV,
        )
        self._logits = None
        if mixer.memories == 1:
            self.layer.router.weight.requires_grad_(False)  # a choice of one: the weight is 1, whatever the logit
        else:
            self.layer.router.register_forward_hook(self._keep_logits)

    def _keep_logits(self, module, inputs, logits):
        self._logits = logits

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [B, T, D]. Returns [B, T, D] and the balancing loss."""
        out, _ = self.layer(x)
        logits, self._logits = self._logits, None
        if logits is None:
            return out, None
        with torch.no_grad():
            ids = route(logits, self.layer.topk)[1]
        return out, load_balancing_loss(logits, ids)


class Softmax(nn.Module):
    """Causal softmax attention with rotary positions."""

    def __init__(self, mixer: Mixer, hidden: int):
        super().__init__()
        self.heads, self.key_size = mixer.heads, mixer.key_size
        self.qkv = nn.Linear(hidden, 3 * mixer.heads * mixer.key_size, bias=False)
        self.out = nn.Linear(mixer.heads * mixer.key_size, hidden, bias=False)
        for linear in (self.qkv, self.out):
            nn.init.normal_(linear.weight, std=INIT_STD)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [B, T, D]. Returns [B, T, D], and None: there is nothing to balance."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, self.key_size)).permute(2, 0, 3, 1, 4)  # [3, B, H, T, K]
        q, k = rotate(qkv[:2])
        o = F.scaled_dot_product_attention(q, k, qkv[2], is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2)), None


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (RoFormer, arXiv 2104.09864) of x [..., T, K] at positions 0 to T - 1."""
    length, size = x.shape[-2:]
    position = torch.arange(length, dtype=torch.float32, device=x.device)
    channel = torch.arange(0, size, 2, dtype=torch.float32, device=x.device)
    angle = position[:, None] * ROTARY_BASE ** (-channel / size)  # [T, K / 2]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


class SwiGLU(nn.Module):
    def __init__(self, hidden: int, width: int):
        super().__init__()
        self.up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=INIT_STD)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


class Block(nn.Module):
    """``x + mixer(RMSNorm(x))``, then ``x + SwiGLU(RMSNorm(x))`` where the models have that layer."""

    def __init__(self, mixer: Mixer, shape: Shape):
        super().__init__()
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)
        self.mixer = (Softmax if mixer.rule == SOFTMAX else Memories)(mixer, shape.hidden)
        self.mlp_norm = nn.RMSNorm(shape.hidden, eps=1e-6) if shape.mlp else None
        self.mlp = SwiGLU(shape.hidden, shape.mlp) if shape.mlp else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mixed, balancing = self.mixer(self.norm(x))
        x = x + mixed
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, balancing


class RecallModel(nn.Module):
    """A language model that is read at the queries alone."""

    def __init__(self, mixer: Mixer, shape: Shape, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, shape.hidden)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        self.blocks = nn.ModuleList(Block(mixer, shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=1e-6)

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns the logits at the queries, [Q, vocabulary], and the mean balancing loss of the layers (or None)."""
        x, balancing = self.embedding(batch.tokens), []
        for block in self.blocks:
            x, loss = block(x)
            balancing.append(loss)
        x = self.norm(x.flatten(0, 1).index_select(0, batch.queries))
        logits = F.linear(x, self.embedding.weight)
        return logits, None if balancing[0] is None else torch.stack(balancing).mean()

    def losses(self, batch: Batch, balancing: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what is minimised, cross entropy plus ``balancing`` times the balancing loss, and cross entropy."""
        logits, uneven = self(batch)
        loss = F.cross_entropy(logits.float(), batch.targets)
        return loss if uneven is None else loss + balancing * uneven, loss


@functools.cache
def count_parameters(mixer: Mixer, shape: Shape, vocabulary: int) -> int:
    """Numbers that training changes; the router of a single memory is not among them."""
    with torch.device("meta"):
        model = RecallModel(mixer, shape, vocabulary)
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
