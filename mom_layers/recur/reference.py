"""Plain loops that say what every operation means. Faster code is compared with these, never the other way round.

Nothing here is fast, nothing is shared with the faster paths, and everything differentiates through autograd.
Shape legend: rows R, tokens N, heads H, key size K, value size V, channels C, segments S, convolution width W.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bounds(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    """(first row, one past the last row) of every segment."""
    edges = cu_seqlens.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


def unit_length(y: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """y / |y| over the last dimension."""
    return y * torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)


def routing_plan_reference(memory_ids, token_cu_seqlens, num_memories, shared=True):
    """Lists every row as (memory, sequence, token) in order. Returns token_of_row and cu_seqlens as Python lists."""
    token_of_row, cu_seqlens = [], [0]
    for memory in range(num_memories + int(shared)):
        for first, last in bounds(token_cu_seqlens):
            for token in range(first, last):
                if memory == num_memories or memory in memory_ids[token].tolist():
                    token_of_row.append(token)
            cu_seqlens.append(len(token_of_row))
    return token_of_row, cu_seqlens


def segment_convolution_reference(rows, weight, cu_seqlens, unit_length_heads=None, initial_tail=None):
    """rows [R, C]; weight [C, W]; initial_tail [S, W - 1, C]. Returns y [R, C] and the final tail [S, W - 1, C].

    Depthwise causal convolution inside each segment, SiLU, and unit length per head where heads are given.
    """
    channels, width = weight.shape
    out, tails = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        before = rows.new_zeros(width - 1, channels) if initial_tail is None else initial_tail[segment]
        history = torch.cat([before, rows[first:last]])
        for t in range(last - first):
            y = F.silu((history[t : t + width] * weight.t()).sum(0))
            out.append(y if unit_length_heads is None else unit_length(y.view(unit_length_heads, -1)).flatten())
        tails.append(history[history.shape[0] - (width - 1) :])
    y = torch.stack(out) if out else rows.new_zeros(0, channels)
    return y, torch.stack(tails)


def gated_delta_rule_reference(q, k, v, g, beta, cu_seqlens, initial_state=None, scale=None):
    """q, k [R, H, K]; v [R, H, V]; g, beta [R, H]; initial_state [S, H, K, V]. Returns o [R, H, V], state [S, H, K, V].

    S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T;  o = scale q^T S        (Gated DeltaNet, arXiv 2412.06464)
    """
    heads, k_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    scale = k_dim**-0.5 if scale is None else scale
    out, states = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        state = q.new_zeros(heads, k_dim, v_dim) if initial_state is None else initial_state[segment]
        for t in range(first, last):
            state = state * g[t].exp()[:, None, None]
            delta = (v[t] - torch.einsum("hk,hkv->hv", k[t], state)) * beta[t][:, None]
            state = state + torch.einsum("hk,hv->hkv", k[t], delta)
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    o = torch.stack(out) if out else v.new_zeros(0, heads, v_dim)
    return o, torch.stack(states)


def gated_linear_attention_reference(q, k, v, g, cu_seqlens, initial_state=None, scale=None):
    """q, k, g [R, H, K]; v [R, H, V]; initial_state [S, H, K, V]. Returns o [R, H, V], state [S, H, K, V].

    S <- diag(exp(g)) S + k v^T;  o = scale q^T S        (gated linear attention, arXiv 2312.06635)
    """
    heads, k_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    scale = k_dim**-0.5 if scale is None else scale
    out, states = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        state = q.new_zeros(heads, k_dim, v_dim) if initial_state is None else initial_state[segment]
        for t in range(first, last):
            state = state * g[t].exp()[:, :, None] + torch.einsum("hk,hv->hkv", k[t], v[t])
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    o = torch.stack(out) if out else v.new_zeros(0, heads, v_dim)
    return o, torch.stack(states)


def _recur_gated_deltanet(q, k, v, raw, parameters, ends):
    """raw: beta, a [R, H] after one another; parameters A_log, dt_bias [H]."""
    b, a = raw.chunk(2, dim=1)
    g = -parameters["A_log"].exp() * F.softplus(a + parameters["dt_bias"])
    return gated_delta_rule_reference(unit_length(q), unit_length(k), v, g, torch.sigmoid(b), ends)[0]


def _recur_gla(q, k, v, raw, parameters, ends):
    """raw: [R, H * rank]; parameters decay_up [H, rank, K], decay_bias [H, K]."""
    up = parameters["decay_up"]
    low_rank = raw.unflatten(1, up.shape[:2])
    g = F.logsigmoid(torch.einsum("rhd,hdk->rhk", low_rank, up) + parameters["decay_bias"]) / 16
    return gated_linear_attention_reference(q, k, v, g, ends)[0]


_RECURRENCES = {"gated_deltanet": _recur_gated_deltanet, "gla": _recur_gla}


def combine_reference(o, weights, row_of_choice, gate, norm_weight, eps):
    """o [R, H, V]; weights [N, k]; row_of_choice [N, slots]; gate [N, H, V]; norm_weight [V]. Returns y [N, H, V].

    y_t = sum_m w_t^m o_t^m + o_t^shared;  RMSNorm over V of every head, times SiLU(gate).
    """
    out = []
    for token, row_ids in enumerate(row_of_choice.tolist()):
        mixed = 0.0
        for slot, row in enumerate(row_ids):
            mixed = mixed + (weights[token, slot] * o[row] if slot < weights.shape[1] else o[row])
        mixed = mixed * torch.rsqrt((mixed * mixed).mean(-1, keepdim=True) + eps) * norm_weight
        out.append(mixed * F.silu(gate[token]))
    return torch.stack(out)


def mixture_of_memories_reference(x, p, *, num_heads, topk, shared, norm_eps=1e-6, rule="gated_deltanet"):
    """One sequence x [L, D] through one layer, one memory at a time. Returns out [L, D].

    p: tensors by the names of :class:`mom_layers.MixtureOfMemories`' parameters.  p_t = softmax(x_t Wr), top-k kept and
    renormalised; memory m runs over the tokens that kept it; y_t = sum_m w_t^m o_t^m + o_t^shared;
    out = Wo (RMSNorm_head(y) * SiLU(x Wg)).
    """
    length = x.shape[0]
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
        gates = projection.shape[0] - k_width - v_width
        k, v, raw = (tokens @ projection.t()).split([k_width, v_width, gates], dim=1)
        ends = torch.tensor([0, len(at)])

        def convolve(rows, name, ends=ends):
            return segment_convolution_reference(rows, p[name], ends)[0].view(len(rows), num_heads, -1)

        q = convolve(tokens @ p["q_proj.weight"].t(), "q_conv")
        k = convolve(k, "k_conv")
        v = convolve(v, "v_conv")
        parameters = {name.removeprefix("rule_parameters."): value for name, value in p.items()}
        o = _RECURRENCES[rule](q, k, v, raw, parameters, ends)
        weight = 1.0 if memory == memories else (kept * chosen).sum(-1)[at][:, None, None]
        y = y.index_add(0, torch.tensor(at), o * weight)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + norm_eps) * p["norm_weight"]
    y = y * F.silu((x @ p["gate_proj.weight"].t()).view(y.shape))
    return y.flatten(1) @ p["out_proj.weight"].t()
