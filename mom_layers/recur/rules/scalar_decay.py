"""What the rules with at most one decay a head share: ``S <- exp(g) S + k v^T;  o = scale q^T S``.

Normalised rules divide: ``z <- exp(g) z + k;  o = (scale q^T S) / (scale q^T z + eps)``. Their state is [K, V + 1], S
and z side by side: z is what a value of one adds up to.

Shape legend: rows R, segments S, heads H, key size K, value size V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype, resolve_kernels
from mom_layers.common.reference import bounds
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules.rule import MemoryRule, RuleInputs, key_by_value
from mom_layers.recur.scalar_decay import scalar_decay
from mom_layers.recur.scalar_decay.operation import initial_state_gradient_triton

# Columns of the values of which the first is one and the others are zero: the fewest that the kernels take.
ONES = 16


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


def _normalised(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels, scale, eps):
    """(scale q^T S) / (scale q^T z + eps), by one recurrence for S and one for z, which is exact on slices too."""
    q, k, v, g = inputs.q, inputs.k, inputs.v, inputs.gates.get("g")
    ones = F.pad(torch.ones_like(v[..., :1]), (0, ONES - 1))
    before = before_z = None
    if initial_state is not None:
        before, before_z = initial_state[..., :-1].contiguous(), F.pad(initial_state[..., -1:], (0, ONES - 1))
    options = {"output_final_state": output_final_state, "scale": scale, "kernels": kernels}
    o, state = scalar_decay(q, k, v, g, cu_seqlens, initial_state=before, **options)
    total, z = scalar_decay(q, k, ones, g, cu_seqlens, initial_state=before_z, **options)
    o = o / (total[..., :1] + eps)
    return o, torch.cat([state, z[..., :1]], dim=-1) if output_final_state else None


def _loop(q, k, v, g, cu_seqlens, initial_state, scale, eps):
    """The plain loop; with eps, normalised."""
    if eps is None:
        return plain_loop(q, k, v, g, cu_seqlens, initial_state, scale)
    both, states = plain_loop(
        q, k, torch.cat([v, torch.ones_like(v[..., :1])], -1), g, cu_seqlens, initial_state, scale
    )
    return both[..., :-1] / (both[..., -1:] + eps), states


def no_parameters(*sizes) -> dict:
    """Of a rule without parameters."""
    return {}


def scalar_decay_rule(
    name: str,
    prepare: Callable[..., RuleInputs],
    loop_inputs: Callable[..., tuple],
    *,
    scale: float | None = None,
    eps: float | None = None,
    features: Callable[[int], int] = lambda head_dim: head_dim,
    **parts,
) -> MemoryRule:
    """A rule of this family.

    Args:
        prepare: as of MemoryRule; the gates are {"g": [R, H] or [H]}, or {} without decay.
        loop_inputs: the arguments q, k, v, raw gates and parameters of the rule's loop -> q, k, v, g of `plain_loop`.
        scale: of q; K ** -0.5 of the longer key when absent.
        eps: makes the rule normalised.
        features: key size -> key size after the feature map.
        parts: further parts of MemoryRule.
    """

    def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
        if eps is not None:
            return _normalised(inputs, cu_seqlens, initial_state, output_final_state, kernels, scale, eps)
        return scalar_decay(
            inputs.q, inputs.k, inputs.v, inputs.gates.get("g"), cu_seqlens,
            initial_state=initial_state, output_final_state=output_final_state, scale=scale, kernels=kernels,
        )  # fmt: skip

    def initial_state_gradient(inputs: RuleInputs, do, cu_seqlens, initial_state, kernels):
        if resolve_kernels(kernels, inputs.q) == "triton":
            return initial_state_gradient_triton(inputs.q, inputs.gates.get("g"), do, cu_seqlens, scale)
        return replace(rule, initial_state_gradient=None).gradient_of_initial_state(
            inputs, do, cu_seqlens, None, kernels
        )  # fmt: skip

    def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
        return _loop(*loop_inputs(q, k, v, raw, parameters), cu_seqlens, initial_state, scale, eps)

    def recurrence_flops(rows: int, heads: int, k_dim: int, v_dim: int) -> float:
        return chunk_flops(rows, heads, features(k_dim), v_dim + (eps is not None))

    rule = MemoryRule(
        name=name,
        prepare=prepare,
        recur=recur,
        transition=transition,
        reference=reference,
        recurrence_flops=recurrence_flops,
        diagonal_transition=True,
        unit_length_keys=False,
        head_sizes=HEAD_SIZES,
        family="scalar_decay",
        linear_in_state=eps is None,
        state_shape=key_by_value if eps is None else lambda k_dim, v_dim: (k_dim, v_dim + 1),
        initial_state_gradient=initial_state_gradient if eps is None else None,
        **{"raw_gates": (), "parameter_shapes": no_parameters, "init_parameters": no_parameters} | parts,
    )
    return rule
