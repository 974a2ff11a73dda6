"""Gated linear attention (GLA, arXiv 2312.06635): every key channel of the state decays at its own rate.

``S <- diag(exp(g)) S + k v^T`` with ``g = logsigmoid(W2 (W1 x) + b) / 16``. W1 maps a token to 16 numbers a head, for
every memory its own; W2 and b, a head each, are shared by all memories. GLA's W1 has 16 numbers in all: one set a head
lets tensor parallelism split the gate as it splits the keys.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mom_layers.common.kernels import compute_dtype
from mom_layers.recur.channel_decay import gated_linear_attention
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.rules.registry import MemoryRule, differentiate_initial_state

RANK = 16
NORMALIZER = 16.0


def parameter_shapes(head_dim: int) -> dict[str, tuple[int, ...]]:
    """The second map of the low-rank gate, and its bias."""
    return {"decay_up": (RANK, head_dim), "decay_bias": (head_dim,)}


def init_parameters(num_heads: int, head_dim: int) -> dict[str, torch.Tensor]:
    """decay_up uniform as PyTorch's linear maps are, and no bias: at first g is close to log(1/2) / 16."""
    bound = RANK**-0.5
    up = torch.empty(num_heads, RANK, head_dim).uniform_(-bound, bound)
    return {"decay_up": up, "decay_bias": torch.zeros(num_heads, head_dim)}


def gates(raw, parameters, kernels):
    """raw decay [R, H * rank]; decay_up [H, rank, K], decay_bias [H, K]. Returns g [R, H, K] in float32 or float64."""
    dtype = compute_dtype(raw["decay"].dtype)
    up, bias = parameters["decay_up"].to(dtype), parameters["decay_bias"].to(dtype)
    low_rank = raw["decay"].to(dtype).unflatten(1, up.shape[:2])
    logits = torch.einsum("rhd,hdk->rhk", low_rank, up) + bias
    return {"g": F.logsigmoid(logits) / NORMALIZER}


def recur(q, k, v, cu_seqlens, gates, initial_state, output_final_state, kernels):
    return gated_linear_attention(
        q, k, v, gates["g"], cu_seqlens,
        initial_state=initial_state, output_final_state=output_final_state, kernels=kernels,
    )  # fmt: skip


def transition(k, cu_seqlens, gates, kernels):
    """What a segment leaves of each key channel of the state that it started from: the exponential of the sum of g.

    Args:
        k: [R, H, K]; its type decides the result's.
        cu_seqlens: [S + 1] int32, from 0 to R; segments may be empty.
        gates: of :func:`gates`.
        kernels: not needed: the same on every device.

    Returns:
        [S, H, K] in float32 (float64 for float64 keys), 1 for empty segments.
    """
    g = gates["g"].to(compute_dtype(k.dtype))
    # The offsets are the caller's cu_seqlens, right by construction: checking them would wait for the device.
    return torch.segment_reduce(g, "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0).exp()


def recurrence_flops(rows: int, heads: int, k_dim: int, v_dim: int) -> float:
    """Forward operations of the chunked form, per row and head, full chunks, and the low-rank gate's second product.

    q k^T and scores times v (2 C K and 2 C V), and the two products with the state (q S, k^T v: 2 K V each).
    """
    per_row = 2 * CHUNK * (k_dim + v_dim) + 4 * k_dim * v_dim + 2 * RANK * k_dim
    return float(rows) * heads * per_row


RULE = MemoryRule(
    name="gla",
    gate_widths={"decay": RANK},
    parameter_shapes=parameter_shapes,
    init_parameters=init_parameters,
    gates=gates,
    recur=recur,
    transition=transition,
    initial_state_gradient=differentiate_initial_state(recur),
    diagonal_transition=True,
    unit_length_keys=False,
    head_sizes=(16, 32, 64, 128, 256),
    recurrence_flops=recurrence_flops,
)
