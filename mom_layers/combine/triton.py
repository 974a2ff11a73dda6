"""Triton kernels that mix a token's rows by the router's weights, normalise and apply the output gate, in both passes.

    m = sum over the choices i of w_i o_i;   rstd = 1 / sqrt(mean(m^2) + eps)
    y = m rstd * norm_weight * SiLU(output gate)

Shape legend: R rows, N tokens, H heads, V values of a head, k routed memories that a token goes to, CHOICES = k + 1 (k
without the shared memory). Tiles are BN tokens by V values, one head at a time. Without weights and
row_of_choice row n is token n's only row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import tanh
from mom_layers.common.sums_triton import sum_parts

FORWARD_TILE_ELEMENTS = 4096  # of a [BN, V] tile: 32 values a thread with 4 warps; timed on an H200
BACKWARD_TILE_ELEMENTS = 1024  # of a [BN, V] tile: a row of 256 values for each warp; not tuned
GRADIENT_PROGRAMS = 1024  # at most so many share the norm weight's gradient, 8 a multiprocessor; timed on an H200


@triton.jit
def _rows_and_weights(weights, row_of_choice, b_n, m_n, TOPK: tl.constexpr, CHOICES: tl.constexpr):
    """The row [BN] of every choice, and the router's weights [BN] of the first TOPK choices."""
    b_rows = ()
    b_w = ()
    for i_choice in tl.static_range(CHOICES):
        if row_of_choice is None:
            b_rows = b_rows + (b_n,)
        else:
            b_rows = b_rows + (tl.load(row_of_choice + b_n * CHOICES + i_choice, mask=m_n, other=0).to(tl.int64),)
        if i_choice < TOPK:
            b_w = b_w + (tl.load(weights + b_n * TOPK + i_choice, mask=m_n, other=0.0),)
    return b_rows, b_w


@triton.jit
def _weigh(b_w, b_x, i_choice: tl.constexpr, TOPK: tl.constexpr):
    """b_x [BN, V] times the choice's weight, which is 1 for the shared memory."""
    if i_choice < TOPK:
        return b_w[i_choice][:, None] * b_x
    else:
        return b_x


@triton.jit
def _load_and_mix(o, b_rows, b_w, m_n, i_h, H: tl.constexpr, V: tl.constexpr, TOPK: tl.constexpr):
    """Every choice's o [BN, V] of head i_h in float32, and the weighted sum m."""
    b_v = tl.arange(0, V)
    # All loads before the first sum, so that they are under way together.
    b_o = ()
    for i_choice in tl.static_range(len(b_rows)):
        p_o = o + (b_rows[i_choice] * H + i_h)[:, None] * V + b_v[None, :]
        b_o = b_o + (tl.load(p_o, mask=m_n[:, None], other=0.0),)
    b_floats = (b_o[0].to(tl.float32),)
    b_mixed = _weigh(b_w, b_floats[0], 0, TOPK)
    for i_choice in tl.static_range(1, len(b_rows)):
        b_floats = b_floats + (b_o[i_choice].to(tl.float32),)
        b_mixed += _weigh(b_w, b_floats[i_choice], i_choice, TOPK)
    return b_floats, b_mixed


@triton.jit
def _silu(b_gate):
    """t = tanh(gate / 2) and SiLU(gate) = gate / 2 (1 + t), in float32."""
    b_half = 0.5 * b_gate.to(tl.float32)
    b_t = tanh(b_half, b_gate.dtype)
    return b_t, b_half + b_half * b_t


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    o, weights, row_of_choice, output_gate, norm_weight, y, num_tokens, eps,
    stride_gate_n: tl.constexpr, stride_gate_h: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y of BN tokens and one head."""
    i_h = tl.program_id(1)
    b_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m_n = b_n < num_tokens
    b_v = tl.arange(0, V)
    b_rows, b_w = _rows_and_weights(weights, row_of_choice, b_n, m_n, TOPK, CHOICES)
    p_gate = output_gate + (b_n * stride_gate_n + i_h * stride_gate_h)[:, None] + b_v[None, :]
    b_gate = tl.load(p_gate, mask=m_n[:, None], other=0.0)  # [BN, V]
    # m
    _, b_mixed = _load_and_mix(o, b_rows, b_w, m_n, i_h, H, V, TOPK)
    # y = m rstd * norm_weight * SiLU(output gate)
    b_rstd = tl.rsqrt(tl.sum(b_mixed * b_mixed, axis=1) / V + eps)
    b_norm = tl.load(norm_weight + b_v).to(tl.float32)  # [V]
    _, b_silu = _silu(b_gate)
    b_y = b_mixed * b_rstd[:, None] * b_norm[None, :] * b_silu
    p_y = y + (b_n * H + i_h)[:, None] * V + b_v[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_n[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    o, weights, row_of_choice, output_gate, norm_weight, dy, do, dweights, d_output_gate, dnorm_weight,
    num_tokens, eps, stride_gate_n: tl.constexpr, stride_gate_h: tl.constexpr, BLOCKS: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The gradients of BLOCKS blocks of BN tokens, and this program's share of the norm weight's gradient.

    With du = dy * SiLU(output gate) * norm_weight the gradient of m is
        dm = rstd du - (sum(du m) rstd^3 / V) m
    All sums over a head's values are of products with m and o as they are, before normalisation, so that no sum waits
    for another.
    """
    i_program = tl.program_id(0)
    b_v = tl.arange(0, V)
    b_k = tl.arange(0, BK)
    b_norm = tl.load(norm_weight + b_v).to(tl.float32)  # [V]
    b_dnorm = tl.zeros([BN, V], dtype=tl.float32)
    for i in range(BLOCKS):
        b_n = ((i_program * BLOCKS + i) * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = b_n < num_tokens
        b_rows, b_w = _rows_and_weights(weights, row_of_choice, b_n, m_n, TOPK, CHOICES)
        # dw of the tokens' k weights, summed over the heads.
        b_dw = tl.zeros([BN, BK], dtype=tl.float32)
        for i_h in range(H):
            p_gate = output_gate + (b_n * stride_gate_n + i_h * stride_gate_h)[:, None] + b_v[None, :]
            b_gate = tl.load(p_gate, mask=m_n[:, None], other=0.0)  # [BN, V]
            b_at = (b_n * H + i_h)[:, None] * V + b_v[None, :]
            b_dy = tl.load(dy + b_at, mask=m_n[:, None], other=0.0)  # [BN, V]
            b_o, b_mixed = _load_and_mix(o, b_rows, b_w, m_n, i_h, H, V, TOPK)

            # du, rstd, and along = sum(du m) rstd^3 / V
            b_t, b_silu = _silu(b_gate)
            b_dy = b_dy.to(tl.float32)
            b_dnormed = b_dy * b_silu
            b_dunit = b_dnormed * b_norm[None, :]
            b_rstd = tl.rsqrt(tl.sum(b_mixed * b_mixed, axis=1) / V + eps)
            b_along = tl.sum(b_dunit * b_mixed, axis=1) * b_rstd * b_rstd * b_rstd / V
            # dw_i = sum over the values of dm o_i, without the tile of dm
            for i_choice in tl.static_range(TOPK):
                b_d = tl.sum(b_dunit * b_o[i_choice], axis=1) * b_rstd
                b_d -= tl.sum(b_mixed * b_o[i_choice], axis=1) * b_along
                b_dw += tl.where(b_k == i_choice, 1.0, 0.0)[None, :] * b_d[:, None]

            # dnorm_weight = sum over the tokens of dy * SiLU(output gate) * m rstd
            b_unit = b_mixed * b_rstd[:, None]
            b_dnorm += b_dnormed * b_unit
            # The output gate's gradient, by SiLU' = 1 - (1 - SiLU) (1 - t) / 2
            b_rest = 1.0 - b_silu
            b_slope = 1.0 - 0.5 * (b_rest - b_rest * b_t)
            b_d_output_gate = b_dy * b_norm[None, :] * b_unit * b_slope
            tl.store(d_output_gate + b_at, b_d_output_gate.to(d_output_gate.dtype.element_ty), mask=m_n[:, None])
            # dm, and do_i = w_i dm
            b_dmixed = b_dunit * b_rstd[:, None] - b_mixed * b_along[:, None]
            for i_choice in tl.static_range(CHOICES):
                p_do = do + (b_rows[i_choice] * H + i_h)[:, None] * V + b_v[None, :]
                b_do = _weigh(b_w, b_dmixed, i_choice, TOPK)
                tl.store(p_do, b_do.to(do.dtype.element_ty), mask=m_n[:, None])
        if dweights is not None:
            p_dw = dweights + b_n[:, None] * TOPK + b_k[None, :]
            tl.store(p_dw, b_dw, mask=m_n[:, None] & (b_k < TOPK)[None, :])
    tl.store(dnorm_weight + i_program * V + b_v, tl.sum(b_dnorm, axis=0))


def _counts(weights, row_of_choice) -> tuple[int, int]:
    """How many of a token's rows have a weight, and how many rows a token has."""
    return 0 if weights is None else weights.shape[1], 1 if row_of_choice is None else row_of_choice.shape[1]


def combine_forward(
    o: torch.Tensor,
    weights: torch.Tensor | None,
    row_of_choice: torch.Tensor | None,
    output_gate: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """The y [N, H, V] of :func:`mom_layers.combine.operation.combine`; all tensors but the output gate contiguous."""
    (tokens, heads, size), topk, choices = output_gate.shape, *_counts(weights, row_of_choice)
    # A program has one head of its tokens.
    block = FORWARD_TILE_ELEMENTS // size
    y = torch.empty(tokens, heads, size, dtype=o.dtype, device=o.device)
    _forward_kernel[(triton.cdiv(tokens, block), heads)](
        o=o,
        weights=weights,
        row_of_choice=row_of_choice,
        output_gate=output_gate,
        norm_weight=norm_weight,
        y=y,
        stride_gate_n=output_gate.stride(0),
        stride_gate_h=output_gate.stride(1),
        num_tokens=tokens,
        eps=eps,
        H=heads,
        V=size,
        TOPK=topk,
        CHOICES=choices,
        BN=block,
        num_warps=4,
    )
    return y


def combine_backward(
    o: torch.Tensor,
    weights: torch.Tensor | None,
    row_of_choice: torch.Tensor | None,
    output_gate: torch.Tensor,
    norm_weight: torch.Tensor,
    dy: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """The gradients of o, weights, output_gate and norm_weight, each in its tensor's type; dy [N, H, V]."""
    (tokens, heads, size), topk, choices = output_gate.shape, *_counts(weights, row_of_choice)
    block = BACKWARD_TILE_ELEMENTS // size
    # A program has all heads of its tokens, because a token's dw is a sum over the heads. A power of two of blocks:
    # Triton compiles a kernel for each number.
    blocks = triton.next_power_of_2(max(1, triton.cdiv(tokens, block * GRADIENT_PROGRAMS)))
    programs = triton.cdiv(tokens, block * blocks)
    do = torch.empty_like(o)
    dweights = None if topk == 0 else torch.empty_like(weights)
    d_output_gate = torch.empty(output_gate.shape, dtype=output_gate.dtype, device=output_gate.device)
    dnorm_weight = torch.empty(programs, size, dtype=torch.float32, device=o.device)
    _backward_kernel[(programs,)](
        o=o,
        weights=weights,
        row_of_choice=row_of_choice,
        output_gate=output_gate,
        norm_weight=norm_weight,
        dy=dy.contiguous(),
        do=do,
        dweights=dweights,
        d_output_gate=d_output_gate,
        dnorm_weight=dnorm_weight,
        stride_gate_n=output_gate.stride(0),
        stride_gate_h=output_gate.stride(1),
        num_tokens=tokens,
        eps=eps,
        BLOCKS=blocks,
        H=heads,
        V=size,
        TOPK=topk,
        CHOICES=choices,
        BN=block,
        BK=triton.next_power_of_2(max(1, topk)),
        num_warps=4,
    )
    return do, dweights, d_output_gate, sum_parts(dnorm_weight, norm_weight.dtype)
