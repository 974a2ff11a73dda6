"""A layer as a plain loop over memories and tokens. The layer's faster paths are compared with this loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.convolve.reference import segment_convolution_reference
from mom_layers.recur.rules import get_rule


def mixture_of_memories_reference(x, p, *, num_heads, topk, shared, norm_eps=1e-6, rule="gated_deltanet"):
    """One sequence x [L, D] through one layer, one memory at a time. Returns out [L, D].

    p: tensors by the names of :class:`mom_layers.MixtureOfMemories`' parameters.  With "text_conv" among these,
    x_t + conv(x)_t takes the place of x_t everywhere.  p_t = softmax(x_t Wr), top-k kept and
    renormalised; memory m runs over the tokens that kept it; y_t = sum_m w_t^m o_t^m + o_t^shared;
    out = Wo (RMSNorm_head(y) * SiLU(x Wg)).
    """
    length, update = x.shape[0], get_rule(rule)
    if "text_conv" in p:
        x = x + segment_convolution_reference(x, p["text_conv"], torch.tensor([0, length]), silu=False)[0]
    k_width, v_width = p["q_conv"].shape[0], p["v_conv"].shape[0]
    probabilities = torch.softmax(x @ p["router.weight"].t(), dim=-1)
    kept, ids = probabilities.topk(topk, dim=-1)
    kept = kept / kept.sum(-1, keepdim=True)
    memories = probabilities.shape[1]
    y = x.new_zeros(length, num_heads, v_width // num_heads)
    for memory in range(memories + int(shared)):
        chosen = ids == memory if memory < memories else torch.ones_like(ids, dtype=torch.bool)
        at = [t for t in range(length) if chosen[t].any()]
        if not at:
            continue
        tokens = x[at]
        projection = p["memory_proj"][min(memory, p["memory_proj"].shape[0] - 1)]
        head_sizes = k_width // update.num_key_heads(num_heads), v_width // num_heads
        sizes = update.projection_sizes(num_heads, *head_sizes)
        k, v, *raw = (tokens @ projection.t()).split(sizes, dim=1)
        ends = torch.tensor([0, len(at)])

        def convolve(rows, name, heads, ends=ends):
            return segment_convolution_reference(rows, p[name], ends)[0].view(len(rows), heads, -1)

        q = convolve(tokens @ p["q_proj.weight"].t(), "q_conv", update.num_key_heads(num_heads))
        k = convolve(k, "k_conv", update.num_key_heads(num_heads))
        v = convolve(v, "v_conv", num_heads)
        parameters = {name.removeprefix("rule_parameters."): value for name, value in p.items()}
        raw = dict(zip(update.gate_widths, raw, strict=True))
        o = update.reference(q, k, v, raw, parameters, ends)[0]
        weight = 1.0 if memory == memories else (kept * chosen).sum(-1)[at][:, None, None]
        y = y.index_add(0, torch.tensor(at), o * weight)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + norm_eps) * p["norm_weight"]
    y = y * F.silu((x @ p["gate_proj.weight"].t()).view(y.shape))
    return y.flatten(1) @ p["out_proj.weight"].t()
