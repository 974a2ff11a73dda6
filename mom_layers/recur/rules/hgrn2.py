"""HGRN2 (arXiv 2404.07904): gated linear attention whose keys are what the decay leaves out.

``S <- diag(f) S + (1 - f) v^T`` with ``f = c + (1 - c) sigmoid(x Wf)`` of K numbers a head, full rank. c is the layer's
lower bound of f, a number for each key channel. In the paper one table for the whole model gives the bounds, P =
softmax over layers and c of layer l is P_1 + ... + P_l, which grows with the layers. Here every layer has a
parameter p of its own with ``c = p^2 / (1 + p^2)``. It starts where the paper's table does, at c = l / layers, and the
first layer's p = 0 is no bound and stays zero in training.

Every memory has its own Wf. The keys that a layer projects for every rule are not read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.rules import gla
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs
from mom_layers.recur.rules.scalar_decay import chunk_flops


class _WithUnread(torch.autograd.Function):
    """x, with a gradient of zero for a tensor that nothing reads: data parallelism waits for every gradient."""

    @staticmethod
    def forward(ctx, x, unread):
        ctx.shape = unread.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, dx.new_zeros(ctx.shape)


def log_decay(raw: torch.Tensor, lower_bound: torch.Tensor) -> torch.Tensor:
    """``g = log f``, [R, H, K] in float32 or more.

    Args:
        raw: [R, H * K], x Wf.
        lower_bound: [H, K], p.
    """
    dtype = compute_dtype(raw.dtype)
    g, p = F.logsigmoid(raw.to(dtype).unflatten(1, lower_bound.shape)), lower_bound.to(dtype)
    # log(p^2 + sigmoid) - log(1 + p^2). Without a bound log(p^2) and its gradient are infinite, and are not taken.
    bounded = p != 0
    log_square = 2 * torch.where(bounded, p, 1).abs().log()
    return torch.where(bounded, torch.logaddexp(log_square, g) - torch.log1p(p * p), g)


def layer_parameters(num_heads: int, head_dim: int, layer: int, num_layers: int) -> dict[str, torch.Tensor]:
    """p of layer number ``layer`` for the bound c = layer / num_layers."""
    return {"lower_bound": torch.full((num_heads, head_dim), (layer / (num_layers - layer)) ** 0.5)}


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    """Keys 1 - f by expm1: in bfloat16 the difference would be wrong by 12 % where f is close to 1."""
    g = log_decay(raw["forget"], parameters["lower_bound"])
    return RuleInputs(_WithUnread.apply(q, k), -torch.expm1(g).to(q.dtype), v, {"g": g})


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gate."""
    share = parameters["lower_bound"] ** 2
    bound = share / (1 + share)
    f = bound + (1 - bound) * torch.sigmoid(raw["forget"].unflatten(1, bound.shape))
    return gla.gated_linear_attention_reference(q, 1 - f, v, f.log(), cu_seqlens, initial_state)


RULE = MemoryRule(
    name="hgrn2",
    raw_gates=(RawGate("forget", columns="key", hf="f"),),
    parameter_shapes=lambda head_dim: {"lower_bound": (head_dim,)},
    init_parameters=lambda num_heads, head_dim: layer_parameters(num_heads, head_dim, 0, 1),
    layer_parameters=layer_parameters,
    prepare=prepare,
    recur=gla.recur,
    transition=gla.transition,
    reference=reference,
    recurrence_flops=chunk_flops,
    diagonal_transition=True,
    unit_length_keys=False,
    head_sizes=HEAD_SIZES,
    family="channel_decay",
)
