"""Which layout, micro-batch and recomputation fit a model on GPUs of a given memory: defaults of the training recipe.

    python -m linear_moe.entry.fit --layers 32 --hidden 4096 ... --gpus 4 --gpu-gb 141

Prints settings of examples/pretrain_mom_a100.sh, such as ``TP=2 MICRO_BATCH=2 RECOMPUTE=0``. The bytes are computed
from shapes, as listed in :func:`bytes_of_token` and :func:`bytes_on_gpu`. They differ by up to 11% from what the 380M
model took on H200s (tools/measured/h200x2_layouts.csv). What the larger models take was not measured.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

LARGEST_MICRO_BATCH = 16
SHARE = 0.88
"""Of a GPU's memory that may be planned: the rest is for the CUDA context, NCCL and what lies between tensors."""
CHUNK, SPAN = 64, 512
"""Rows of which the recurrence keeps scores, and rows of which it keeps one state (docs/glossary.md)."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model whose layers are all MoM layers with K = V, with the recipe's tied embeddings and SwiGLU."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    head_dim: int
    memories: int
    topk: int
    sequence: int
    vocab: int

    @property
    def width(self) -> int:
        """H K."""
        return self.heads * self.head_dim

    @property
    def routed_parameters(self) -> int:
        """Of the routed memories' projections, which expert parallelism splits."""
        return self.layers * self.memories * self.hidden * (2 * self.width + 2 * self.heads)

    @property
    def other_parameters(self) -> int:
        layer = self.hidden * (2 * self.width + 2 * self.heads)  # the shared memory
        layer += 3 * self.hidden * self.width + self.hidden * self.memories + 3 * self.hidden * self.ffn
        return self.layers * layer + self.vocab * self.hidden


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel axes."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    context: int = 1
    data: int = 1


def bytes_of_token(model: Model) -> int:
    """What a layer keeps of a token for the backward pass, in 16 bits: residual and normed inputs of mixer and MLP,
    query, output gate and mixed output, the MLP's 3 vectors; and for every row projected, convolved and read vectors,
    scores and states.
    """
    of_token = 8 * model.hidden + 6 * model.width + 6 * model.ffn
    states = 2 * model.heads * model.head_dim**2 // SPAN
    of_row = 2 * 2 * model.width + 2 * 3 * model.width + 2 * model.width + 2 * 2 * model.heads * CHUNK + states
    return of_token + (model.topk + 1) * of_row


def bytes_on_gpu(model: Model, layout: Layout, micro_batch: int, recompute: bool) -> int:
    """Bytes on the fullest GPU: weights in 16 bits and gradients in 32, Adam's three 32-bit numbers divided over the
    data-parallel ranks, the activations of the micro-batches under way, the logits in 16 and in 32 bits, and with
    expert parallelism the tokens and queries that arrive by an all-to-all.

    The first stage of a pipeline has a micro-batch under way for every stage, so that activations do not shrink with
    the number of stages. With recomputation the logits are gone before a layer is computed again.
    """
    shards = layout.tensor * layout.pipeline
    routed, rest = model.routed_parameters, model.other_parameters
    parameters = 6 * (rest + routed // layout.expert) // shards + 12 * (rest + routed) // (shards * layout.data)
    tokens = micro_batch * model.sequence // layout.context
    layer, logits = bytes_of_token(model) // layout.tensor, 6 * model.vocab // layout.tensor
    if layout.expert > 1:
        layer += 2 * model.topk * (model.hidden + model.width // layout.tensor)
    kept = model.layers * (2 * model.hidden // layout.tensor) + max(layer, logits)
    return parameters + tokens * (kept if recompute else model.layers * layer + logits)


def tensor_sizes(model: Model, given: int | None, largest: int) -> list[int]:
    """The tensor-parallel sizes to try: the size that is given, or the powers of two that divide the heads."""
    return [given] if given else [2**i for i in range(8) if 2**i <= largest and model.heads % 2**i == 0]


def choose(
    model: Model, *, gpus: int, gpu_bytes: float, global_batch: int, tensor: int | None = None,
    pipeline: int = 1, expert: int = 1, context: int = 1, micro_batch: int | None = None,
    recompute: bool | None = None, largest_tensor: int = 8,
) -> tuple[int, int, bool] | None:  # fmt: skip
    """Tensor-parallel size, micro-batch and whether to recompute; None where nothing fits.

    Sizes that are given stay. Recomputation comes last: it costs a third more products, and tensor parallelism within a
    machine costs less. The micro-batch is the largest power of two that fits and divides the global batch.
    """
    tensors = tensor_sizes(model, tensor, largest_tensor)
    batches = [micro_batch] if micro_batch else [2**i for i in range(LARGEST_MICRO_BATCH.bit_length() - 1, -1, -1)]
    for again in [recompute] if recompute is not None else [False, True]:
        for size in tensors:
            model_ranks = size * pipeline * context
            if gpus % model_ranks:
                continue
            replicas = gpus // model_ranks
            layout = Layout(size, pipeline, expert, context, replicas * context)
            for batch in batches:
                divides = micro_batch is not None or global_batch % (batch * replicas) == 0
                if divides and bytes_on_gpu(model, layout, batch, again) <= SHARE * gpu_bytes:
                    return size, batch, again
    return None


def main(argv=None) -> int:
    """Prints the settings, or an error that names the smallest need; exit status 1 where nothing fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("layers", "hidden", "ffn", "heads", "head-dim", "memories", "topk", "sequence", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True, help="of all machines together")
    parser.add_argument("--gpus-here", type=int, required=True, help="of one machine, within which TP stays")
    parser.add_argument("--gpu-gb", type=float, help="memory of a GPU in 10^9 bytes; that of the first GPU if left out")
    parser.add_argument("--global-batch", type=int, required=True, help="sequences of a step")
    for name in ("tensor", "micro-batch", "recompute"):
        parser.add_argument(f"--{name}", type=int, help="given, not chosen")
    for name in ("pipeline", "expert", "context"):
        parser.add_argument(f"--{name}", type=int, default=1)
    options = parser.parse_args(argv)
    ranks = (options.tensor or 1) * options.pipeline * options.context
    if options.gpus % ranks:
        parser.error(f"--gpus {options.gpus}: use a multiple of {ranks}, the GPUs that hold one model together")
    model = Model(*(getattr(options, name) for name in Model.__dataclass_fields__))
    gpu_gb = options.gpu_gb
    if gpu_gb is None:
        import torch

        gpu_gb = torch.cuda.get_device_properties(0).total_memory / 1e9
    given = {name: getattr(options, name) for name in ("tensor", "pipeline", "expert", "context", "micro_batch")}
    recompute = None if options.recompute is None else bool(options.recompute)
    found = choose(
        model, gpus=options.gpus, gpu_bytes=1e9 * gpu_gb, global_batch=options.global_batch, recompute=recompute,
        largest_tensor=options.gpus_here, **given,
    )  # fmt: skip
    if found is None:
        need, size = min(
            (bytes_on_gpu(model, layout, options.micro_batch or 1, True), layout.tensor)
            for size in tensor_sizes(model, options.tensor, options.gpus_here)
            if options.gpus % (ranks := size * options.pipeline * options.context) == 0
            for layout in [Layout(size, options.pipeline, options.expert, options.context, options.gpus // ranks)]
        )
        print(
            f"error: the model does not fit: with TP={size} and recomputation a GPU would need about "
            f"{need / SHARE / 1e9:.0f} GB, and has {gpu_gb:.0f}: use more GPUs, or set TP, MICRO_BATCH and RECOMPUTE: "
            "then the script counts no bytes",
            file=sys.stderr,
        )
        return 1
    print(f"TP={found[0]} MICRO_BATCH={found[1]} RECOMPUTE={int(found[2])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
