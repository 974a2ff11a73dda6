"""Triton kernels of one token of every sequence, for the gated delta rule.

The launches: project the token, update the states of its memories and read them, then normalise what was read and move
the convolutions' tails on. A few tokens read the weights of their own memories only. As soon as the tokens together
read as many weights as there are, one matrix product projects every token for all memories and reads every weight once.
Each kernel computes the choice of memories from the router's logits by itself.

Shape legend: sequences B, routed memories M, all memories A, CHOICES of a token (k routed memories and the shared
memory), projections P of a token (one for each choice, one for each of all memories, or one that all memories share),
heads H, key size K, value size V, filter width W, hidden size D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import softplus

PROJECTION_TILE = (16, 256)  # BN outputs of a program, and BD inputs at a time; not tuned
VALUE_TILE = 32  # BV columns of the state that a program holds; not tuned


@triton.jit
def _choose(logits, i_b, M: tl.constexpr, TOPK: tl.constexpr, SHARED: tl.constexpr, BM: tl.constexpr):
    """Ids and weights of a token's choices: renormalised top-k of the softmax, then the shared memory with weight 1."""
    ids = ()
    odds = ()
    total = tl.zeros((), tl.float32)
    if TOPK > 0:
        b_m = tl.arange(0, BM)
        b_logit = tl.load(logits + i_b * M + b_m, mask=b_m < M, other=float("-inf")).to(tl.float32)
        largest = tl.max(b_logit, axis=0)
    # The k largest logits, one after another; odds are relative to the largest.
    for _ in tl.static_range(TOPK):
        i_m = tl.argmax(b_logit, axis=0)
        odd = tl.exp(tl.max(b_logit, axis=0) - largest)
        ids = ids + (i_m,)
        odds = odds + (odd,)
        total += odd
        b_logit = tl.where(b_m == i_m, float("-inf"), b_logit)
    weights = ()
    for i in tl.static_range(TOPK):
        weights = weights + (odds[i] / total,)
    if SHARED:
        ids = ids + (i_b * 0 + M,)
        weights = weights + (total * 0.0 + 1.0,)
    return ids, weights


@triton.jit
def _project_kernel(
    x, logits, projection, projected, WIDTH: tl.constexpr, D: tl.constexpr,
    M: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """projected[b, i] = projection[memory of choice i] x[b]."""
    i_b, i_choice = tl.program_id(0) // CHOICES, tl.program_id(0) % CHOICES
    ids, _ = _choose(logits, i_b, M, TOPK, CHOICES > TOPK, BM)
    # A tuple cannot be indexed by a number that is known on the device only.
    i_m = ids[0]
    for i in tl.static_range(1, CHOICES):
        i_m = tl.where(i_choice == i, ids[i], i_m)
    # A dot product for each of BN outputs: BD products at a time, added up at the end.
    b_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_sum = tl.zeros([BN, BD], tl.float32)
    p_weight = projection + i_m.to(tl.int64) * (WIDTH * D) + b_n[:, None] * D
    for i in range(0, D, BD):
        b_d = i + tl.arange(0, BD)
        b_x = tl.load(x + i_b * D + b_d, mask=b_d < D, other=0.0).to(tl.float32)
        m_tile = (b_n < WIDTH)[:, None] & (b_d < D)[None, :]
        b_sum += tl.load(p_weight + b_d[None, :], mask=m_tile, other=0.0).to(tl.float32) * b_x[None, :]
    p_out = projected + tl.program_id(0) * WIDTH + b_n
    tl.store(p_out, tl.sum(b_sum, axis=1).to(projected.dtype.element_ty), mask=b_n < WIDTH)


@triton.jit
def _projected_row(
    projected, i_b, i_choice: tl.constexpr, i_m, P: tl.constexpr, BY_MEMORY: tl.constexpr, WIDTH: tl.constexpr
):
    """Pointer to a token's projection for the memory of a choice."""
    i_p = 0 if P == 1 else i_m if BY_MEMORY else i_choice
    return projected + (i_b.to(tl.int64) * P + i_p) * WIDTH


@triton.jit
def _convolved(tail, i_tail, newest, weight, b_c, C: tl.constexpr, W: tl.constexpr):
    """SiLU(sum_j weight[:, j] x_j) of channels b_c in float32, where x is a memory's tail and the newest input."""
    b_u = tl.load(weight + b_c * W + W - 1).to(tl.float32) * tl.load(newest + b_c).to(tl.float32)
    for j in tl.static_range(W - 1):
        b_x = tl.load(tail + (i_tail * (W - 1) + j) * C + b_c).to(tl.float32)
        b_u += tl.load(weight + b_c * W + j).to(tl.float32) * b_x
    return b_u * tl.sigmoid(b_u)


@triton.jit
def _update_kernel(
    q, projected, logits, q_conv, k_conv, v_conv, A_log, dt_bias, recurrent, q_tail, k_tail, v_tail,
    mixed, scale, eps, step_b, step_m,
    STRIDE_Q: tl.constexpr, WIDTH: tl.constexpr, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, BM: tl.constexpr, P: tl.constexpr,
    BY_MEMORY: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Updates and reads BV columns of one head's state, for all memories of one token."""
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    low: tl.constexpr = projected.dtype.element_ty
    ids, weights = _choose(logits, i_b, M, TOPK, CHOICES > TOPK, BM)
    b_k = tl.arange(0, K)
    b_v = tl.program_id(1) * BV + tl.arange(0, BV)
    # g = -exp(A_log) softplus(a + dt_bias): the part that all memories share.
    b_rate = tl.exp(tl.load(A_log + i_h).to(tl.float32))
    b_bias = tl.load(dt_bias + i_h).to(tl.float32)
    b_mixed = tl.zeros([BV], tl.float32)
    for i in tl.static_range(CHOICES):
        i_memory = i_b.to(tl.int64) * step_b + ids[i] * step_m
        p_row = _projected_row(projected, i_b, i, ids[i], P, BY_MEMORY, WIDTH)
        # q, k = unit(SiLU(conv(..))), v = SiLU(conv(..)), rounded to the type in which the general path keeps them.
        b_q = _convolved(q_tail, i_memory, q + i_b * STRIDE_Q, q_conv, i_h * K + b_k, H * K, W)
        b_key = _convolved(k_tail, i_memory, p_row, k_conv, i_h * K + b_k, H * K, W)
        b_q = (b_q * tl.rsqrt(tl.sum(b_q * b_q, axis=0) + eps)).to(low).to(tl.float32)
        b_key = (b_key * tl.rsqrt(tl.sum(b_key * b_key, axis=0) + eps)).to(low).to(tl.float32)
        b_value = _convolved(v_tail, i_memory, p_row + H * K, v_conv, i_h * V + b_v, H * V, W)
        b_value = b_value.to(low).to(tl.float32)
        # beta and exp(g)
        beta = tl.sigmoid(tl.load(p_row + H * (K + V) + i_h).to(tl.float32))
        decay = tl.exp(-b_rate * softplus(tl.load(p_row + H * (K + V + 1) + i_h).to(tl.float32) + b_bias))
        # S <- exp(g) S;  S <- S + k (beta (v - k^T S))^T
        p_S = recurrent + (i_memory * H + i_h) * K * V + b_k[:, None] * V + b_v[None, :]
        b_S = decay * tl.load(p_S)
        b_delta = beta * (b_value - tl.sum(b_key[:, None] * b_S, axis=0))
        b_S += b_key[:, None] * b_delta[None, :]
        tl.store(p_S, b_S)
        # mixed += w (scale q)^T S
        b_mixed += weights[i] * tl.sum(b_q[:, None] * b_S, axis=0) * scale
    tl.store(mixed + (i_b * H + i_h) * V + b_v, b_mixed)


@triton.jit
def _move_on(tail, i_tail, newest, b_c, C: tl.constexpr, W: tl.constexpr):
    """Drops a tail's oldest input and appends the newest. Without a convolution there is no tail."""
    if W > 1:
        p_tail = tail + i_tail * (W - 1) * C + b_c
        for j in tl.static_range(W - 2):
            tl.store(p_tail + j * C, tl.load(p_tail + (j + 1) * C))
        tl.store(p_tail + (W - 2) * C, tl.load(newest + b_c).to(tail.dtype.element_ty))


@triton.jit
def _finish_kernel(
    q, projected, logits, output_gate, norm_weight, mixed, y, q_tail, k_tail, v_tail, norm_eps, step_b, step_m,
    STRIDE_Q: tl.constexpr, STRIDE_GATE: tl.constexpr, WIDTH: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr,
    M: tl.constexpr, TOPK: tl.constexpr, CHOICES: tl.constexpr, BM: tl.constexpr, P: tl.constexpr,
    BY_MEMORY: tl.constexpr,
):  # fmt: skip
    """y of one head, and its part of the tails, which every program of the update has read by now."""
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    b_k, b_v = i_h * K + tl.arange(0, K), i_h * V + tl.arange(0, V)
    # y = RMSNorm(mixed) * norm_weight * SiLU(output gate)
    b_mixed = tl.load(mixed + i_b * H * V + b_v)
    b_mixed *= tl.rsqrt(tl.sum(b_mixed * b_mixed, axis=0) / V + norm_eps)
    b_gate = tl.load(output_gate + i_b * STRIDE_GATE + b_v).to(tl.float32)
    b_y = b_mixed * tl.load(norm_weight + tl.arange(0, V)).to(tl.float32) * b_gate * tl.sigmoid(b_gate)
    tl.store(y + i_b * H * V + b_v, b_y.to(y.dtype.element_ty))
    # The tails of the token's memories.
    ids, _ = _choose(logits, i_b, M, TOPK, CHOICES > TOPK, BM)
    for i in tl.static_range(CHOICES):
        i_memory = i_b.to(tl.int64) * step_b + ids[i] * step_m
        p_row = _projected_row(projected, i_b, i, ids[i], P, BY_MEMORY, WIDTH)
        _move_on(q_tail, i_memory, q + i_b * STRIDE_Q, b_k, H * K, W)
        _move_on(k_tail, i_memory, p_row, b_k, H * K, W)
        _move_on(v_tail, i_memory, p_row + H * K, b_v, H * V, W)


def decode_step_triton(
    x: torch.Tensor,
    q: torch.Tensor,
    output_gate: torch.Tensor,
    logits: torch.Tensor | None,
    parameters,
    state,
    steps: tuple[int, int],
    topk: int,
    shared: bool,
    unit_length_eps: float,
) -> torch.Tensor:
    """The y [B, H V] of :func:`mom_layers.decode.operation.decode_step`, with ``state`` changed in place.

    Args:
        steps: the distance between two sequences and between two memories in the state's tensors, counted in the parts
            that a tensor holds for one memory of one sequence.
    """
    (batch, hidden), memories = x.shape, 0 if logits is None else logits.shape[1]
    heads, choices = parameters.num_heads, topk + int(shared)
    keys, width = parameters.q_conv.shape
    values = parameters.v_conv.shape[0]
    projection = parameters.projection
    if projection is None:  # the caller has projected the tokens of one memory
        projections, row_width = 1, x.stride(0)
    else:
        projections, row_width, _ = projection.shape  # A, or 1 where all memories share one
    # In float32: the sum over the memories is normalised before it is rounded.
    mixed = torch.empty(batch, values, dtype=torch.float32, device=x.device)
    y = torch.empty(batch, values, dtype=x.dtype, device=x.device)
    routing = dict(logits=logits, M=memories, TOPK=topk, CHOICES=choices, BM=triton.next_power_of_2(max(1, memories)))
    # One matrix product reads every projection once; worth it where the tokens' choices would read as many weights.
    by_memory = batch * choices >= projections
    if projection is None:
        projected = x
    elif by_memory:
        projected = torch.nn.functional.linear(x, projection.flatten(0, 1))
    else:
        projected = torch.empty(batch, choices, row_width, dtype=x.dtype, device=x.device)
        BN, BD = PROJECTION_TILE
        _project_kernel[(batch * choices, triton.cdiv(row_width, BN))](
            x=x,
            projection=projection,
            projected=projected,
            WIDTH=row_width,
            D=hidden,
            BN=BN,
            BD=BD,
            num_warps=4,
            **routing,
        )
    routing |= dict(STRIDE_Q=q.stride(0), WIDTH=row_width, P=projections if by_memory else choices, BY_MEMORY=by_memory)
    sizes = dict(H=heads, K=keys // heads, V=values // heads, W=width, **routing)
    step_b, step_m = steps
    tails = dict(q_tail=state.q_tail, k_tail=state.k_tail, v_tail=state.v_tail, step_b=step_b, step_m=step_m)
    # A program has BV columns of a head's state: columns do not depend on one another.
    BV = min(VALUE_TILE, values // heads)
    _update_kernel[(batch * heads, values // heads // BV)](
        q=q,
        projected=projected,
        q_conv=parameters.q_conv,
        k_conv=parameters.k_conv,
        v_conv=parameters.v_conv,
        A_log=parameters.rule_parameters["A_log"],
        dt_bias=parameters.rule_parameters["dt_bias"],
        recurrent=state.recurrent,
        mixed=mixed,
        scale=(keys // heads) ** -0.5,
        eps=unit_length_eps,
        BV=BV,
        num_warps=4,
        **tails,
        **sizes,
    )
    _finish_kernel[(batch * heads,)](
        q=q,
        projected=projected,
        output_gate=output_gate,
        norm_weight=parameters.norm_weight,
        mixed=mixed,
        y=y,
        norm_eps=parameters.settings.norm_eps,
        STRIDE_GATE=output_gate.stride(0),
        num_warps=4,
        **tails,
        **sizes,
    )
    return y
