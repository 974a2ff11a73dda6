"""Metrics of the memory routers: tokens per memory, routing entropy, and the two losses.

Recording adds to tensors on the device and never waits for the device. Every rank records its own layers and tokens;
`MemoryMetrics.collect` sums over the ranks, and `summarize` computes shares and means from the sums.

Shape legend: tokens N, memories M, layers L.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.transformer.moe.moe_logging import MoEMetricsTracker

LOSSES = ("load_balancing_loss", "z_loss")


class MemoryMetrics:
    """Accumulates the routing of this process's MoM layers since the last `collect`.

    Attributes:
        losses: tracker for the losses of TopKRouter; make it Megatron's current tracker while a memory router runs.
    """

    def __init__(self) -> None:
        self.losses = MoEMetricsTracker()
        # Layer number -> float32 [2 M + 2]: choices of each memory, its part of the entropy, tokens, forward passes.
        self._rows: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def record_routing(self, layer_number: int, routing_map: torch.Tensor, logits: torch.Tensor) -> None:
        """Adds one forward pass of one layer.

        Call it in training only, and once for each microbatch: not in the first, gradient-free pass of a layer with
        recomputed activations. TopKRouter records its losses under the same condition.

        Args:
            layer_number: number of the layer, from 1.
            routing_map: [N, M] bool, the memories each token goes to.
            logits: [N, M] logits of the router, of any floating type.
        """
        tokens, memories = routing_map.shape
        row = self._rows.get(layer_number)
        if row is None or row.numel() != 2 * memories + 2:
            row = torch.zeros(2 * memories + 2, device=logits.device)
            self._rows[layer_number] = row
        entropy = torch.special.entr(torch.softmax(logits, dim=-1, dtype=torch.float32))
        row[:-2] += torch.cat((routing_map, entropy), dim=1).sum(0)
        row[-2] += tokens
        row[-1] += 1

    @torch.no_grad()
    def collect(self, num_layers: int, num_memories: int) -> torch.Tensor:
        """Sums the records of all processes since the last call, and clears the records.

        Every process of the job must call `collect`, a process without a MoM layer too. Waits for the device.

        One sum over all ranks is right for every kind of parallelism. Data, context and sequence parallel ranks hold
        different tokens, pipeline ranks different layers. Tensor parallel ranks without sequence parallelism count
        every token equally often, which changes no share and no mean.

        Args:
            num_layers: L of the whole model, with the layers of multi-token prediction.
            num_memories: M, without the shared memory.

        Returns:
            [L, 2 M + 4] float64 on the CPU, one row a layer: choices of each memory, each memory's part of the entropy,
            tokens, forward passes, and the two losses summed over the passes. Results of several calls may be added.
        """
        device = next(iter(self._rows.values())).device if self._rows else _default_device()
        totals = torch.zeros(num_layers, 2 * num_memories + 2 + len(LOSSES), device=device)
        for layer_number, row in self._rows.items():
            totals[layer_number - 1, : row.numel()] = row
            row.zero_()
        for column, name in enumerate(LOSSES, start=-len(LOSSES)):
            if name in self.losses.metrics:
                entry = self.losses.metrics[name]
                # TopKRouter records on each rank of the group a part of the balancing loss, and the whole z-loss.
                parts = 1 if entry.reduce_group is None else entry.reduce_group.size()
                totals[: len(entry.values), column] = entry.values.to(device) * parts
        self.losses.clear()
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(totals)
        return totals.double().cpu()


def summarize(totals: torch.Tensor) -> dict:
    """Shares and means from the result of `MemoryMetrics.collect`, or from the sum of several results.

    Returns:
        load: {layer number: [M] share of each memory in the layer's choices, which sum to 1}; 1/M each when balanced.
            Without layers that recorded nothing.
        entropy: {layer number: mean entropy in nats of softmax over all M logits}; log(M) for equal logits.
        load_min, load_max: over layers and memories; None when nothing was recorded.
        load_balancing_loss: mean over layers and microbatches of ``M sum_m (share of choices) (mean probability)``,
            without its coefficient: 1 where the choices are balanced or the probabilities uniform, up to M / k when
            the router is sure of the same k memories for every token. None when the loss is switched off.
        z_loss: mean of ``logsumexp(logits)^2``, without its coefficient; None when the loss is switched off.
    """
    num_memories = (totals.shape[1] - 2 - len(LOSSES)) // 2
    layers = [index for index in range(len(totals)) if totals[index, 2 * num_memories] > 0]
    choices, entropy, rest = totals[layers].split([num_memories, num_memories, 2 + len(LOSSES)], dim=1)
    load = choices / choices.sum(1, keepdim=True)
    tokens, passes, *losses = rest.unbind(1)
    report = {
        "load": {index + 1: row.tolist() for index, row in zip(layers, load, strict=True)},
        "entropy": dict(zip([index + 1 for index in layers], (entropy.sum(1) / tokens).tolist(), strict=True)),
        "load_min": load.min().item() if layers else None,
        "load_max": load.max().item() if layers else None,
    }
    for name, values in zip(LOSSES, losses, strict=True):
        report[name] = (values / passes).mean().item() if values.any() else None
    return report


def scalars(report: dict) -> dict[str, float]:
    """The values of a report by the names of their plots. Layers count from 1, memories from 0 as in the router."""
    values = {}
    for layer, load in report["load"].items():
        values |= {f"mom/load/layer_{layer:02d}/memory_{memory}": share for memory, share in enumerate(load)}
    values |= {f"mom/entropy/layer_{layer:02d}": nats for layer, nats in report["entropy"].items()}
    values |= {f"mom/{name}": report[name] for name in ("load_max", *LOSSES) if report[name] is not None}
    return values


def write_layout(layers: Iterable[int], writer) -> None:
    """Writes TensorBoard's tab "Custom Scalars": the loss and the speed, then one chart a layer with all its memories.

    layers: numbers of the layers with memories.
    """
    training = {
        "loss": ["Multiline", ["lm loss", "lm loss validation"]],
        "tokens per second": ["Multiline", ["tokens-per-second"]],
        "learning rate": ["Multiline", ["learning-rate"]],
        "gradient norm": ["Multiline", ["grad-norm"]],
    }
    memories = {
        "balancing loss": ["Multiline", ["mom/load_balancing_loss"]],
        **{f"load of layer {layer}": ["Multiline", [f"mom/load/layer_{layer:02d}/.*"]] for layer in layers},
        "entropy": ["Multiline", ["mom/entropy/.*"]],
    }
    writer.add_custom_scalars({"training": training, "memories": memories})


def write(values: dict[str, float], iteration: int, writer, wandb_writer) -> None:
    """Writes scalars to the TensorBoard and Weights & Biases writers of this process; None stands for no writer."""
    if writer is not None:
        for name, value in values.items():
            writer.add_scalar(name, value, iteration)
    if wandb_writer is not None and values:
        wandb_writer.log(values, iteration)


def memory_metrics() -> MemoryMetrics:
    """The metrics of this process."""
    global _metrics
    if _metrics is None:
        _metrics = MemoryMetrics()
    return _metrics


def _default_device() -> torch.device | str | int:
    return torch.cuda.current_device() if torch.cuda.is_available() else "cpu"


_metrics: MemoryMetrics | None = None
