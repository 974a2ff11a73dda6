"""Trains a small language model of Mixture-of-Memories layers in a plain PyTorch loop, then lets the model write.

    python examples/train_layer.py                                     one or two minutes on a CPU
    python examples/train_layer.py --text book.txt --steps 2000 --device cuda

Tokens are bytes, so that no tokenizer is needed. Without --text the model reads some of Python's own source files.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from mom_layers import MemoryState, MixtureOfMemories
from mom_layers.route.router import load_balancing_loss

BYTES = 256


class Block(nn.Module):
    """A MoM layer and an MLP, each after a norm and around a residual connection."""

    def __init__(self, hidden: int):
        super().__init__()
        self.mixer_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.mixer = MixtureOfMemories(hidden, num_heads=2, head_dim=32, num_memories=4, topk=2)
        self.mlp = nn.Sequential(nn.Linear(hidden, 3 * hidden), nn.GELU(), nn.Linear(3 * hidden, hidden))

    def forward(self, x: torch.Tensor, state: MemoryState | None, output_state: bool):
        """x [sequences, tokens, hidden]. Returns x, the layer's new state or None, and the layer's balancing loss."""
        normed = self.mixer_norm(x)
        mixed, state = self.mixer(normed, state=state, output_state=output_state)
        # Without this loss the router may send every token to the same memories.
        logits = self.mixer.router(normed).flatten(0, 1)
        balance = load_balancing_loss(logits, logits.topk(self.mixer.topk).indices)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state, balance


class LanguageModel(nn.Module):
    """Predicts the next byte of a text."""

    def __init__(self, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(BYTES, hidden)
        self.blocks = nn.ModuleList([Block(hidden) for _ in range(layers)])
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, BYTES)

    def forward(self, tokens: torch.Tensor, states: list[MemoryState] | None = None, output_states: bool = False):
        """tokens [sequences, tokens]. Returns logits, the states after the last token, and the balancing loss."""
        x, new_states, balances = self.embedding(tokens), [], []
        for index, block in enumerate(self.blocks):
            x, state, balance = block(x, states[index] if states else None, output_states)
            new_states.append(state)
            balances.append(balance)
        return self.head(self.norm(x)), new_states, torch.stack(balances).mean()


def train(model: LanguageModel, text: torch.Tensor, steps: int, batch: int, length: int) -> list[float]:
    """Trains on random pieces of a text [bytes]. Returns the language-model loss of every step, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(0, len(text) - length, (batch,)).tolist()
        pieces = torch.stack([text[start : start + length + 1] for start in starts])
        logits, _, balance = model(pieces[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())
        (loss + 0.01 * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step == 1 or step % 10 == 0:
            print(f"step {step:4d}/{steps} | loss {losses[-1]:.3f} | balance {balance.item():.2f}", flush=True)
    return losses


@torch.inference_mode()
def write(model: LanguageModel, prompt: bytes, count: int, device: str) -> bytes:
    """Continues a prompt by ``count`` bytes. Every step reads one byte; the states have the same size at every step."""
    tokens = torch.tensor([list(prompt)], device=device)
    logits, states, _ = model(tokens, output_states=True)
    written = []
    for _ in range(count):
        token = torch.multinomial(torch.softmax(logits[:, -1].float() / 0.8, dim=-1), 1)
        written.append(token.item())
        logits, states, _ = model(token, states, output_states=True)
    kept = sum(state.nbytes for state in states)
    print(f"\nstates of all layers: {kept / 1e6:.2f} MB, after {len(prompt) + count} bytes as after the first")
    return bytes(written)


def main(argv: list[str] | None = None) -> list[float]:
    """Runs the example. Returns the losses."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--text", type=Path, help="file to train on [Python's own modules argparse and inspect]")
    parser.add_argument("--steps", type=int, default=100, help="[%(default)s]")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence [%(default)s]")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size [%(default)s]")
    parser.add_argument("--layers", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--write", type=int, default=200, help="bytes to write at the end [%(default)s]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    args = parser.parse_args(argv)
    torch.manual_seed(0)

    files = [args.text] if args.text else [Path(argparse.__file__), Path(inspect.__file__)]
    data = b"".join(file.read_bytes() for file in files)
    if len(data) <= args.length:
        parser.error(f"the text has {len(data)} bytes: expected more than --length {args.length}")
    text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().to(args.device)
    model = LanguageModel(args.hidden, args.layers).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} bytes of text, {args.device}")
    losses = train(model, text, args.steps, args.batch, args.length)
    prompt = data[: args.length // 4]
    print(
        prompt.decode(errors="replace"), "-->", write(model, prompt, args.write, args.device).decode(errors="replace")
    )
    return losses


if __name__ == "__main__":
    main()
