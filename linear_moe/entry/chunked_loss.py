"""The output layer and the loss in chunks of tokens, so that the logits of a long sequence never exist at once.

Megatron's model computes the logits of all tokens of a micro-batch: for 131,072 tokens and a vocabulary of 32,000, 8 GB
in 16 bits, and two to four times as much for the loss and its gradient. Here a chunk's logits live while its loss, or
its gradient, is computed. The backward pass computes each chunk's logits a second time: one more product of the output
layer.

Shape legend: s tokens of a sequence on this rank, b sequences, h hidden size, t tensor-parallel ranks that share a
sequence's tokens (1 without sequence parallelism).
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from megatron_patches.patch import Patch, wrap


def loss_in_chunks(
    *, hidden_states, output_layer, output_weight, labels, compute_language_model_loss, scale_logits, config,
    runtime_gather_output, **_,
) -> torch.Tensor:  # fmt: skip
    """The loss of every token, [b, s], for Megatron's hook ``output_processor``, which gives the arguments.

    hidden_states: [s / t, b, h]. labels: [b, s]. ``config.mom_loss_chunk`` is the number of tokens whose logits exist
    at once.
    """
    ranks = config.tensor_model_parallel_size if output_layer.sequence_parallel else 1
    length, batch = hidden_states.shape[:2]

    def loss_of(hidden, labels_here):
        logits, _ = output_layer(hidden, weight=output_weight, runtime_gather_output=runtime_gather_output)
        return compute_language_model_loss(labels_here, scale_logits(logits))

    # With sequence parallelism the output layer gathers the same places of all ranks' parts of the sequence.
    labels = labels.unflatten(1, (ranks, length))
    step = max(1, config.mom_loss_chunk // (batch * ranks))
    losses = [
        checkpoint(loss_of, hidden, part.flatten(1), use_reentrant=False, preserve_rng_state=False).unflatten(
            1, (ranks, -1)
        )
        for hidden, part in zip(hidden_states.split(step), labels.split(step, dim=2), strict=True)
    ]
    return torch.cat(losses, dim=2).flatten(1)


def _compute_in_chunks(postprocess, model, *positional, labels=None, output_processor=None, **keywords):
    chunk = getattr(model.config, "mom_loss_chunk", 0)
    if chunk and labels is not None and output_processor is None:
        output_processor = loss_in_chunks
    return postprocess(model, *positional, labels=labels, output_processor=output_processor, **keywords)


PATCH = Patch(
    name="chunked-loss",
    reason="the logits of a long sequence do not fit beside the model, and Megatron's scripts pass no output_processor",
    removed_when="Megatron computes the output layer and the loss in chunks of tokens",
    targets=(wrap("megatron.core.models.gpt.gpt_model", "GPTModel._postprocess", _compute_in_chunks),),
)
