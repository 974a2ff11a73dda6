"""What the memories of a trained model hold, from held-out text.

    python -m linear_moe.evidence.memories CHECKPOINTS OUTPUT.json WINDOWS.npy TOKENIZER

Of every MoM layer: the share of the tokens that each memory takes, the entropy of the routing, the tokens that a memory
takes most above its share, a piece of text with the memory of every token, how much a memory's answers change when the
tokens of other memories are removed from the layer's input, and the loss when a memory holds nothing.

Shape legend: windows W, window length L, tokens N, memories M, all memories A, choices k.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from linear_moe.evidence.repeats import since_last
from linear_moe.evidence.trained_model import token_losses, trained_model
from linear_moe.temporary import replaced_file
from linear_moe.tokens import vocabulary_size
from mom_layers.mixing import read_memories
from mom_layers.route.plan import build_routing_plan

TOKENS = 1 << 16  # of text that is read
SENT_TOKENS = 12  # listed of a memory
FEWEST = 20  # occurrences of a token that is listed
EXAMPLE = 160  # tokens of the piece of text


@torch.no_grad()
def main() -> None:
    checkpoints, output, path, folder = map(Path, sys.argv[1:])
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    windows = np.load(path)
    windows = torch.from_numpy(windows[: max(1, TOKENS // (windows.shape[1] - 1))].astype(np.int64))
    with trained_model(checkpoints) as model:
        mixers = memory_layers(model)
        with recorded(mixers) as records:
            losses = token_losses(model, windows)
        found = {"losses": loss_summary(losses, windows), "layers": {}}
        for number, mixer in mixers.items():
            hidden, ids = records[number]["hidden"], records[number]["ids"]
            found["layers"][number] = routing(mixer, hidden, ids) | {
                "tokens": favourites(ids, windows[:, :-1], tokenizer, mixer.config.mom_num_memories),
                "example": example(ids, windows, tokenizer),
                "isolation": isolation(mixer, hidden[:, :1], ids[:, :1]),
                "without": {memory: loss_summary(lost, windows) for memory, lost in knocked_out(model, mixer, windows)},
            }
    with replaced_file(output) as partial:
        partial.write_text(json.dumps(found))


def memory_layers(model: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """{number of the layer, from 1: its token mixer} of the MoM layers."""
    from linear_moe.layer.mixer import MomTokenMixer

    layers = {layer.layer_number: layer.self_attention for layer in model.decoder.layers}
    return {number: mixer for number, mixer in layers.items() if isinstance(mixer, MomTokenMixer)}


@contextmanager
def recorded(mixers: dict[int, torch.nn.Module]) -> Iterator[dict[int, dict[str, torch.Tensor]]]:
    """Keeps the input of every router, hidden [L, W, D], and its choices, ids [L, W, k], of a forward pass."""
    records: dict[int, dict[str, torch.Tensor]] = {}

    def keep(number: int):
        def hook(router, inputs, outputs):
            records[number] = {"hidden": inputs[0].detach(), "ids": outputs[1].detach()}

        return hook

    handles = [mixer.router.register_forward_hook(keep(number)) for number, mixer in mixers.items()]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def routing(mixer: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> dict:
    """Shares of the choices, and the mean entropy in nats of a token's routing and of the shares."""
    memories = mixer.config.mom_num_memories
    load = torch.bincount(ids.flatten(), minlength=memories).double()
    load = load / load.sum()
    probabilities = torch.softmax(mixer.router.gating(hidden).float(), -1)
    return {
        "load": load.tolist(),
        "entropy": torch.special.entr(probabilities).sum(-1).mean().item(),
        "load_entropy": torch.special.entr(load).sum().item(),
    }


def favourites(ids: torch.Tensor, tokens: torch.Tensor, tokenizer, memories: int) -> list[list[tuple[str, float, int]]]:
    """For every memory (text, share of its occurrences that the memory takes, occurrences) of tokens, the largest
    shares first."""
    ids, tokens = ids.transpose(0, 1).cpu(), tokens.cpu()  # [W, L, k], [W, L]
    size = max(vocabulary_size(tokenizer), int(tokens.max()) + 1)
    counts = torch.bincount(tokens.flatten(), minlength=size)
    lists = []
    for memory in range(memories):
        taken = torch.bincount(tokens[(ids == memory).any(-1)].flatten(), minlength=size)
        share = torch.where(counts >= FEWEST, taken / counts.clamp(min=1), torch.zeros(()))
        order = torch.argsort(share + 1e-9 * counts, descending=True)[:SENT_TOKENS].tolist()
        lists.append(
            [(tokenizer.decode([t]), round(share[t].item(), 4), int(counts[t])) for t in order if share[t] > 0]
        )
    return lists


def example(ids: torch.Tensor, windows: torch.Tensor, tokenizer) -> list[tuple[str, list[int]]]:
    """(text, its memories) of the tokens in the middle of the first window."""
    length = min(EXAMPLE, len(ids))
    start = (len(ids) - length) // 2
    chosen = ids[start : start + length, 0].sort(-1).values.tolist()
    tokens = windows[0, start : start + length].tolist()
    return [(tokenizer.decode([token]), memories) for token, memories in zip(tokens, chosen, strict=True)]


def isolation(mixer: torch.nn.Module, hidden: torch.Tensor, ids: torch.Tensor) -> dict[str, list[float]]:
    """How much answers change when the layer's input keeps only the tokens of one memory, of the answers' size.

    hidden [L, 1, D], ids [L, 1, k]. Of every memory: the change of its own answers ("own"), which is zero up to
    rounding where nothing crosses from memory to memory; and of the shared memory's answers at the same tokens
    ("shared"): what one memory that takes all tokens suffers from the others' tokens.
    """
    settings, tokens, choices = mixer.settings, hidden[:, 0], ids[:, 0]
    parameters = mixer.memory_parameters(mixer.memory_proj)

    def answers(kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """o [R, H V] and row_of_choice [N, k + 1] of some tokens."""
        x, chosen = tokens[kept], choices[kept]
        borders = torch.tensor([0, len(x)], dtype=torch.int32, device=x.device)
        plan = build_routing_plan(
            chosen, borders, num_memories=settings.num_memories, shared=settings.shared_memory,
            kernels=mixer.config.mom_kernels,
        )  # fmt: skip
        projected, _ = mixer.in_proj(x[:, None])
        q = projected[:, 0, : mixer.key_width].contiguous()
        o, _ = read_memories(x, q, plan, parameters, kernels=mixer.config.mom_kernels)
        return o.flatten(1).float(), plan.row_of_choice

    whole, rows = answers(torch.arange(len(tokens), device=tokens.device))
    changes: dict[str, list[float]] = {"own": [], "shared": []}
    for memory in range(settings.num_memories):
        kept = (choices == memory).any(-1).nonzero()[:, 0]
        if not len(kept):
            continue
        alone, rows_alone = answers(kept)
        column = (choices[kept] == memory).int().argmax(-1, keepdim=True)
        before, after = (r.gather(1, column)[:, 0].long() for r in (rows[kept], rows_alone))
        changes["own"].append(_relative(whole[before], alone[after]))
        if settings.shared_memory:
            changes["shared"].append(_relative(whole[rows[kept, -1].long()], alone[rows_alone[:, -1].long()]))
    return changes


def _relative(before: torch.Tensor, after: torch.Tensor) -> float:
    return ((after - before).norm() / before.norm()).item()


def knocked_out(
    model: torch.nn.Module, mixer: torch.nn.Module, windows: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """(memory, losses [W, L]) with the memory's values zero, so that the memory holds and answers nothing; "shared" for
    the shared memory. Nothing where all memories share one projection."""
    if mixer.memory_proj.shape[0] < mixer.settings.num_all_memories:
        return
    values = slice(mixer.sizes[0], mixer.sizes[0] + mixer.sizes[1])
    for memory in range(mixer.settings.num_all_memories):
        kept = mixer.memory_proj[memory, values].clone()
        mixer.memory_proj[memory, values] = 0
        try:
            losses = token_losses(model, windows)
        finally:
            mixer.memory_proj[memory, values] = kept
        yield ("shared" if memory == mixer.settings.num_memories else str(memory)), losses


def loss_summary(losses: torch.Tensor, windows: torch.Tensor) -> dict[str, float]:
    """Mean loss of all tokens, of the tokens that repeat a bigram of the window, and of the other tokens."""
    repeats = []
    for window in windows.numpy():
        repeats.append(since_last(window[:-1] * (int(windows.max()) + 1) + window[1:]) > 0)
    repeats = torch.from_numpy(np.stack(repeats)).to(losses.device)
    parts = {"loss": losses, "repeating": losses[repeats], "others": losses[~repeats]}
    return {name: part.double().mean().item() for name, part in parts.items()}


if __name__ == "__main__":
    main()
