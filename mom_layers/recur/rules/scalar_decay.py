"""What the rules with at most one decay a head share: ``S <- exp(g) S + k v^T;  o = scale q^T S``.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

import torch

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.reference import bounds
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules.rule import RuleInputs


def transition(inputs: RuleInputs, cu_seqlens, kernels):
    """The share that a segment leaves of its initial state: the exponential of the sum of g, the same for every key.

    Args:
        inputs: with the gate g [R, H] or [H], or without; the keys' type decides the result's type.
        cu_seqlens: [S + 1] int32, from 0 to R; segments may be empty.
        kernels: not read, because PyTorch computes the sum on every device.

    Returns:
        [S, H, K] in float32 (float64 for float64 keys), 1 for empty segments.
    """
    (_, heads, k_dim), segments = inputs.k.shape, cu_seqlens.shape[0] - 1
    dtype, g = compute_dtype(inputs.k.dtype), inputs.gates.get("g")
    if g is None:
        return torch.ones(segments, heads, k_dim, dtype=dtype, device=inputs.k.device)
    if g.dim() == 1:
        total = g.to(dtype) * cu_seqlens.diff()[:, None]
    else:
        # The offsets are the caller's cu_seqlens, right by construction: a check would wait for the device.
        total = torch.segment_reduce(g.to(dtype), "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0)
    return total.exp()[..., None].expand(-1, -1, k_dim)


def plain_loop(q, k, v, g, cu_seqlens, initial_state=None, scale=None):
    """The plain loop: ``S <- exp(g) S + k v^T;  o = scale q^T S``.

    Args:
        q, k: [R, H, K]. v: [R, H, V]. g: [R, H], [H] for all rows, or None.
        cu_seqlens: [S + 1].
        initial_state: [S, H, K, V]; zeros when absent.
        scale: of q; K ** -0.5 when absent.

    Returns:
        o [R, H, V] and the final states [S, H, K, V].
    """
    heads, k_dim, v_dim = q.shape[1], q.shape[2], v.shape[2]
    scale = k_dim**-0.5 if scale is None else scale
    out, states = [], []
    for segment, (first, last) in enumerate(bounds(cu_seqlens)):
        state = q.new_zeros(heads, k_dim, v_dim) if initial_state is None else initial_state[segment]
        for t in range(first, last):
            if g is not None:
                state = state * (g if g.dim() == 1 else g[t]).exp()[:, None, None]
            state = state + torch.einsum("hk,hv->hkv", k[t], v[t])
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    o = torch.stack(out) if out else v.new_zeros(0, heads, v_dim)
    return o, torch.stack(states)


def chunk_flops(rows: int, heads: int, k_dim: int, v_dim: int) -> float:
    """Forward operations of the chunked form, full chunks: q k^T and scores times v (2 C K and 2 C V a row and head),
    and the two products with the state (q S and k^T v: 2 K V each)."""
    return float(rows) * heads * (2 * CHUNK * (k_dim + v_dim) + 4 * k_dim * v_dim)
