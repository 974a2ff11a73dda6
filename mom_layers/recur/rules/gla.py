"""Gated linear attention (GLA, arXiv 2312.06635): every key channel of the state decays at its own rate.

``S <- diag(exp(g)) S + k v^T`` with ``g = logsigmoid(W2 (W1 x) + b) / 16``. Every memory has its own W1, which maps a
token to 16 numbers a head. All memories share W2 and b, one set for each head. In the paper W1 gives 16 numbers for
all heads together; 16 for each head let tensor parallelism split the gate by head, as it splits keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernel_choice import compute_dtype
from mom_layers.common.reference import bounds
from mom_layers.common.supported import HEAD_SIZES
from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.rules.rule import MemoryRule, RawGate, RuleInputs
from mom_layers.recur.rules.scalar_decay import chunk_flops

RANK = 16
NORMALIZER = 16.0


def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    """The second map of the low-rank gate, and its bias."""
    return {"decay_up": (RANK, head_dim), "decay_bias": (head_dim,)}


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """decay_up uniform as in PyTorch's linear maps, a bias of zero: g starts close to log(1/2) / 16."""
    bound = RANK**-0.5
    up = torch.empty(num_heads, RANK, head_dim).uniform_(-bound, bound)
    return {"decay_up": up, "decay_bias": torch.zeros(num_heads, head_dim)}


def gates(raw, parameters):
    """From the raw gate decay [R, H * rank], decay_up [H, rank, K], decay_bias [H, K]: g [R, H, K], float32 or more."""
    dtype = compute_dtype(raw["decay"].dtype)
    up, bias = parameters["decay_up"].to(dtype), parameters["decay_bias"].to(dtype)
    low_rank = raw["decay"].to(dtype).unflatten(1, up.shape[:2])
    logits = torch.einsum("rhd,hdk->rhk", low_rank, up) + bias
    return {"g": F.logsigmoid(logits) / NORMALIZER}


def prepare(q, k, v, raw, parameters, kernels) -> RuleInputs:
    return RuleInputs(q, k, v, gates(raw, parameters))


def recur(inputs: RuleInputs, cu_seqlens, initial_state, output_final_state, kernels):
    return gated_linear_attention(
        inputs.q, inputs.k, inputs.v, inputs.gates["g"], cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, kernels=kernels,
    )  # fmt: skip


def transition(inputs: RuleInputs, cu_seqlens, kernels):
    """The share of each key channel that a segment leaves of its initial state: the exponential of the sum of g.

    Args:
        inputs: of :func:`prepare`; the keys' type decides the result's type.
        cu_seqlens: [S + 1] int32, from 0 to R; segments may be empty.
        kernels: not read, because PyTorch computes the sum on every device.

    Returns:
        [S, H, K] in float32 (float64 for float64 keys), 1 for empty segments.
    """
    g = inputs.gates["g"].to(compute_dtype(inputs.k.dtype))
    # The offsets are the caller's cu_seqlens, right by construction: a check would wait for the device.
    return torch.segment_reduce(g, "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0).exp()


def gated_linear_attention_reference(q, k, v, g, cu_seqlens, initial_state=None, scale=None):
    """The plain loop: ``S <- diag(exp(g)) S + k v^T;  o = scale q^T S``.

    Args:
        q, k, g: [R, H, K]. v: [R, H, V].
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
            state = state * g[t].exp()[:, :, None] + torch.einsum("hk,hv->hkv", k[t], v[t])
            out.append(scale * torch.einsum("hk,hkv->hv", q[t], state))
        states.append(state)
    o = torch.stack(out) if out else v.new_zeros(0, heads, v_dim)
    return o, torch.stack(states)


def reference(q, k, v, raw, parameters, cu_seqlens, initial_state=None):
    """The plain loop with the rule's gate."""
    up = parameters["decay_up"]
    low_rank = raw["decay"].unflatten(1, up.shape[:2])
    g = F.logsigmoid(torch.einsum("rhd,hdk->rhk", low_rank, up) + parameters["decay_bias"]) / NORMALIZER
    return gated_linear_attention_reference(q, k, v, g, cu_seqlens, initial_state)


def recurrence_flops(rows: int, heads: int, k_dim: int, v_dim: int) -> float:
    """Forward operations of the chunked form, and the low-rank gate's second product: 2 RANK K a row and head."""
    return chunk_flops(rows, heads, k_dim, v_dim) + float(rows) * heads * 2 * RANK * k_dim


RULE = MemoryRule(
    name="gla",
    raw_gates=(RawGate("decay", columns=RANK, hf="decay"),),
    parameter_shapes=parameter_shapes,
    init_parameters=init_parameters,
    prepare=prepare,
    recur=recur,
    transition=transition,
    reference=reference,
    recurrence_flops=recurrence_flops,
    diagonal_transition=True,
    unit_length_keys=False,
    head_sizes=HEAD_SIZES,
    family="channel_decay",
)
