"""The plain loop of the delta rule with a decay a channel: it says what the operation means.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch

from mom_layers.common.reference import bounds


def channel_delta_rule_reference(q, k, v, g, erase, write, cu_seqlens, initial_state=None, scale=None):
    """``S <- diag(exp(g)) S;  S <- S + k (write v - S^T (erase k))^T;  o = scale q^T S``, row by row.

    Args:
        q, k, g: [R, H, K]. v: [R, H, V].
        erase: [R, H] or [R, H, K]. write: [R, H] or [R, H, V].
        cu_seqlens: [S + 1].
        initial_state: [S, H, K, V]; zeros when absent.
        scale: of q; K ** -0.5 when absent.

    Returns:
        o [R, H, V] and the final states [S, H, K, V].
    """
    heads, k_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    scale = k_dim**-0.5 if scale is None else scale
    erased, written = (x * (rate if rate.dim() == 3 else rate[..., None]) for x, rate in ((k, erase), (v, write)))
    out, states = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        state = q.new_zeros(heads, k_dim, v_dim) if initial_state is None else initial_state[segment]
        for t in range(first, last):
            state = state * g[t].exp()[:, :, None]
            error = written[t] - torch.einsum("hk,hkv->hv", erased[t], state)
            state = state + torch.einsum("hk,hv->hkv", k[t], error)
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    o = torch.stack(out) if out else v.new_zeros(0, heads, v_dim)
    return o, torch.stack(states)
