"""Triton kernels that mix a token's rows by the router's weights, then normalise and gate, forward and backward.

Shape legend: R rows, N tokens, H heads, V values of a head, k memories chosen by a token, slots = k + 1 (k without the
shared memory). Tiles are BN tokens by V values, one head at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from mom_layers.common.activations_triton import tanh
from mom_layers.common.sums_triton import sum_parts

FORWARD_TILE_ELEMENTS = 4096  # of a [BN, V] tile: 32 values a thread with 4 warps
BACKWARD_TILE_ELEMENTS = 1024  # a row of 256 values a warp; not tuned
GRADIENT_PROGRAMS = 1024  # at most so many share the norm weight's gradient: 8 a multiprocessor of an H200
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
HEAD_SIZES = (16, 32, 64, 128, 256)


@triton.jit
def _rows_and_weights(weights, row_of_choice, b_n, m_n, TOPK: tl.constexpr, SLOTS: tl.constexpr):
    """Every slot's row [BN], and the router's weights [BN] of the first TOPK."""
    b_rows = ()
    b_w = ()
    for i_slot in tl.static_range(SLOTS):
        b_rows = b_rows + (tl.load(row_of_choice + b_n * SLOTS + i_slot, mask=m_n, other=0).to(tl.int64),)
        if i_slot < TOPK:
            b_w = b_w + (tl.load(weights + b_n * TOPK + i_slot, mask=m_n, other=0.0),)
    return b_rows, b_w


@triton.jit
def _weigh(b_w, b_x, i_slot: tl.constexpr, TOPK: tl.constexpr):
    """b_x [BN, V] times the slot's weight, which is 1 for the shared memory."""
    if i_slot < TOPK:
        return b_w[i_slot][:, None] * b_x
    else:
        return b_x


@triton.jit
def _load_and_mix(o, b_rows, b_w, m_n, i_h, H: tl.constexpr, V: tl.constexpr, TOPK: tl.constexpr):
    """Every slot's [BN, V] of head i_h in float32, and their weighted sum."""
    b_v = tl.arange(0, V)
    b_o = ()
    for i_slot in tl.static_range(len(b_rows)):
        p_o = o + (b_rows[i_slot] * H + i_h)[:, None] * V + b_v[None, :]
        b_o = b_o + (tl.load(p_o, mask=m_n[:, None], other=0.0),)
    b_floats = (b_o[0].to(tl.float32),)
    b_mixed = _weigh(b_w, b_floats[0], 0, TOPK)
    for i_slot in tl.static_range(1, len(b_rows)):
        b_floats = b_floats + (b_o[i_slot].to(tl.float32),)
        b_mixed += _weigh(b_w, b_floats[i_slot], i_slot, TOPK)
    return b_floats, b_mixed


@triton.jit
def _silu(b_gate):
    """t = tanh(gate / 2) and SiLU(gate), in float32."""
    b_half = 0.5 * b_gate.to(tl.float32)
    b_t = tanh(b_half, b_gate.dtype)
    return b_t, b_half + b_half * b_t


@triton.jit(do_not_specialize=["num_tokens"])
def _forward_kernel(
    o, weights, row_of_choice, gate, norm_weight, y, num_tokens, eps,
    stride_gate_n: tl.constexpr, stride_gate_h: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i_h = tl.program_id(1)
    b_n = (tl.program_id(0) * BN + tl.arange(0, BN)).to(tl.int64)
    m_n = b_n < num_tokens
    b_v = tl.arange(0, V)
    b_rows, b_w = _rows_and_weights(weights, row_of_choice, b_n, m_n, TOPK, SLOTS)
    p_gate = gate + (b_n * stride_gate_n + i_h * stride_gate_h)[:, None] + b_v[None, :]
    b_gate = tl.load(p_gate, mask=m_n[:, None], other=0.0)  # [BN, V]
    _, b_mixed = _load_and_mix(o, b_rows, b_w, m_n, i_h, H, V, TOPK)
    b_rstd = tl.rsqrt(tl.sum(b_mixed * b_mixed, axis=1) / V + eps)
    b_norm = tl.load(norm_weight + b_v).to(tl.float32)  # [V]
    _, b_silu = _silu(b_gate)
    b_y = b_mixed * b_rstd[:, None] * b_norm[None, :] * b_silu
    p_y = y + (b_n * H + i_h)[:, None] * V + b_v[None, :]
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=m_n[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _backward_kernel(
    o, weights, row_of_choice, gate, norm_weight, dy, do, dweights, dgate, dnorm_weight,
    num_tokens, eps, stride_gate_n: tl.constexpr, stride_gate_h: tl.constexpr, BLOCKS: tl.constexpr,
    H: tl.constexpr, V: tl.constexpr, TOPK: tl.constexpr, SLOTS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """All sums over a head are of products with the rows as they are, before the division by their length, so that none
    waits for another."""
    i_program = tl.program_id(0)
    b_v = tl.arange(0, V)
    b_k = tl.arange(0, BK)
    b_norm = tl.load(norm_weight + b_v).to(tl.float32)  # [V]
    b_dnorm = tl.zeros([BN, V], dtype=tl.float32)
    for i in range(BLOCKS):
        b_n = ((i_program * BLOCKS + i) * BN + tl.arange(0, BN)).to(tl.int64)
        m_n = b_n < num_tokens
        b_rows, b_w = _rows_and_weights(weights, row_of_choice, b_n, m_n, TOPK, SLOTS)
        b_dw = tl.zeros([BN, BK], dtype=tl.float32)
        for i_h in range(H):
            p_gate = gate + (b_n * stride_gate_n + i_h * stride_gate_h)[:, None] + b_v[None, :]
            b_gate = tl.load(p_gate, mask=m_n[:, None], other=0.0)  # [BN, V]
            b_at = (b_n * H + i_h)[:, None] * V + b_v[None, :]
            b_dy = tl.load(dy + b_at, mask=m_n[:, None], other=0.0)  # [BN, V]
            b_o, b_mixed = _load_and_mix(o, b_rows, b_w, m_n, i_h, H, V, TOPK)

            b_t, b_silu = _silu(b_gate)
            b_dy = b_dy.to(tl.float32)
            b_dnormed = b_dy * b_silu
            b_dunit = b_dnormed * b_norm[None, :]
            b_rstd = tl.rsqrt(tl.sum(b_mixed * b_mixed, axis=1) / V + eps)
            b_along = tl.sum(b_dunit * b_mixed, axis=1) * b_rstd * b_rstd * b_rstd / V
            for i_slot in tl.static_range(TOPK):
                b_d = tl.sum(b_dunit * b_o[i_slot], axis=1) * b_rstd - tl.sum(b_mixed * b_o[i_slot], axis=1) * b_along
                b_dw += tl.where(b_k == i_slot, 1.0, 0.0)[None, :] * b_d[:, None]

            b_unit = b_mixed * b_rstd[:, None]
            b_dnorm += b_dnormed * b_unit
            b_rest = 1.0 - b_silu
            b_slope = 1.0 - 0.5 * (b_rest - b_rest * b_t)  # SiLU's, at the gate
            b_dgate = b_dy * b_norm[None, :] * b_unit * b_slope
            tl.store(dgate + b_at, b_dgate.to(dgate.dtype.element_ty), mask=m_n[:, None])
            b_dmixed = b_dunit * b_rstd[:, None] - b_mixed * b_along[:, None]
            for i_slot in tl.static_range(SLOTS):
                p_do = do + (b_rows[i_slot] * H + i_h)[:, None] * V + b_v[None, :]
                b_do = _weigh(b_w, b_dmixed, i_slot, TOPK)
                tl.store(p_do, b_do.to(do.dtype.element_ty), mask=m_n[:, None])
        p_dw = dweights + b_n[:, None] * TOPK + b_k[None, :]
        tl.store(p_dw, b_dw, mask=m_n[:, None] & (b_k < TOPK)[None, :])
    tl.store(dnorm_weight + i_program * V + b_v, tl.sum(b_dnorm, axis=0))


class Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, weights, row_of_choice, gate, norm_weight, eps):
        (_, heads, size), (tokens, topk) = o.shape, weights.shape
        block = FORWARD_TILE_ELEMENTS // size
        y = torch.empty(tokens, heads, size, dtype=o.dtype, device=o.device)
        _forward_kernel[(triton.cdiv(tokens, block), heads)](
            o=o,
            weights=weights,
            row_of_choice=row_of_choice,
            gate=gate,
            norm_weight=norm_weight,
            y=y,
            stride_gate_n=gate.stride(0),
            stride_gate_h=gate.stride(1),
            num_tokens=tokens,
            eps=eps,
            H=heads,
            V=size,
            TOPK=topk,
            SLOTS=row_of_choice.shape[1],
            BN=block,
            num_warps=4,
        )
        ctx.save_for_backward(o, weights, row_of_choice, gate, norm_weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        o, weights, row_of_choice, gate, norm_weight = ctx.saved_tensors
        (_, heads, size), (tokens, topk) = o.shape, weights.shape
        block = BACKWARD_TILE_ELEMENTS // size
        blocks = triton.next_power_of_2(max(1, triton.cdiv(tokens, block * GRADIENT_PROGRAMS)))
        programs = triton.cdiv(tokens, block * blocks)
        do = torch.empty_like(o)
        dweights = torch.empty_like(weights)
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dnorm_weight = torch.empty(programs, size, dtype=torch.float32, device=o.device)
        _backward_kernel[(programs,)](
            o=o,
            weights=weights,
            row_of_choice=row_of_choice,
            gate=gate,
            norm_weight=norm_weight,
            dy=dy.contiguous(),
            do=do,
            dweights=dweights,
            dgate=dgate,
            dnorm_weight=dnorm_weight,
            stride_gate_n=gate.stride(0),
            stride_gate_h=gate.stride(1),
            num_tokens=tokens,
            eps=ctx.eps,
            BLOCKS=blocks,
            H=heads,
            V=size,
            TOPK=topk,
            SLOTS=row_of_choice.shape[1],
            BN=block,
            BK=triton.next_power_of_2(topk),
            num_warps=4,
        )
        return do, dweights, None, dgate, sum_parts(dnorm_weight, norm_weight.dtype), None


def _check(o, weights, row_of_choice, gate, norm_weight):
    if o.dim() != 3 or o.dtype not in FLOATS or o.shape[2] not in HEAD_SIZES:
        raise ValueError(f"o must be [R, H, V] in 16 or 32 bits, V one of {HEAD_SIZES}, got {o.dtype} {list(o.shape)}")
    if weights.dim() != 2 or weights.dtype != torch.float32:
        raise ValueError(f"weights must be float32 [N, k], got {weights.dtype} {list(weights.shape)}")
    (rows, heads, size), (tokens, topk) = o.shape, weights.shape
    slots = row_of_choice.shape[-1]
    if row_of_choice.dtype != torch.int32 or row_of_choice.shape != (tokens, slots) or slots not in (topk, topk + 1):
        raise ValueError(
            f"row_of_choice must be int32 [{tokens}, {topk} or {topk + 1}], "
            f"got {row_of_choice.dtype} {list(row_of_choice.shape)}"
        )
    if tokens * slots != rows:
        raise ValueError(f"o has {rows} rows; {tokens} tokens in {slots} slots have {tokens * slots}")
    if gate.shape != (tokens, heads, size) or gate.dtype not in FLOATS or (gate.numel() and gate.stride(2) != 1):
        raise ValueError(
            f"gate must be {[tokens, heads, size]} in 16 or 32 bits with adjacent values, "
            f"got {gate.dtype} {list(gate.shape)} with strides {gate.stride()}"
        )
    if norm_weight.shape != (size,) or norm_weight.dtype not in FLOATS:
        raise ValueError(
            f"norm_weight must be [{size}] in 16 or 32 bits, got {norm_weight.dtype} {list(norm_weight.shape)}"
        )


def combine_triton(
    o: torch.Tensor,
    weights: torch.Tensor,
    row_of_choice: torch.Tensor,
    gate: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """Mixes the memories' outputs of every token, then a gated RMSNorm over each head.

        m_t = sum_i w_t^i o[row_of_choice[t, i]];   y_t = RMSNorm(m_t) * norm_weight * SiLU(gate_t)

    Args:
        o: [R, H, V] in float32, bfloat16 or float16, V one of 16, 32, 64, 128, 256; every row is some token's slot.
        weights: [N, k] float32.
        row_of_choice: [N, slots] int32, slots k or k + 1; slot k is the shared memory's and has weight 1.
        gate: [N, H, V]; may be a view of a wider tensor, with adjacent values.
        norm_weight: [V].
        eps: added to the mean square.

    Returns:
        y [N, H, V] in o's dtype. All sums are in float32.

    Raises:
        ValueError: a shape, dtype or stride that does not fit.
    """
    _check(o, weights, row_of_choice, gate, norm_weight)
    return Combine.apply(
        o.contiguous(), weights.contiguous(), row_of_choice.contiguous(), gate, norm_weight.contiguous(), eps
    )
