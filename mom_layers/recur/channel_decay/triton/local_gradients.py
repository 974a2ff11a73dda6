"""Gated linear attention: dq, dk and dg, from a chunk's own rows and from what the states gave.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, block length BC, chunk slots N.

Sums of g are written as in `chunk_local`; u, w and d_decays are those of `state_gradients`:

    (15)  dP = scale * lower(do v^T)
    (16)  dq_i = sum_{j <= i} dP_ij k_j exp(g(j, i]) + exp(g(start, i]) u_i
    (17)  dk_j = sum_{i >= j} dP_ij q_i exp(g(j, i]) + exp(g(j, end]) w_j

In a whole chunk, with c of (5), the sums over pairs are matrix products, and so are those without the terms i = j,
written x and y here:

    (18)  x_i = sum_{j < i} dP_ij k_j exp(-c_j) + exp(g(start, end] / 2) u_i,   y_j = sum_{i > j} dP_ij q_i exp(c_i),
          dq_i = exp(c_i) x_i + dP_ii k_i,    dk_j = exp(-c_j) (y_j + exp(g(start, end] / 2) w_j) + dP_jj q_j
    (19)  dg_t = d_decays + sum_{i >= t} (q_i exp(c_i) x_i - k_i exp(-c_i) y_i)
                 + sum_{j < t} k_j exp(g(j, end]) w_j

The terms i = j would have to cancel in (19). `block_gradients` has the chunks that are not whole.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_decay.tensors import Inputs, StateParts
from mom_layers.recur.channel_decay.triton.block_gradients import block_gradients, gradient_arguments
from mom_layers.recur.channel_decay.triton.blocks import PRECISION, exponents
from mom_layers.recur.channel_decay.triton.launches import Launch, launches_for
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import chunk_of_program, tile_of_chunk


@triton.jit(do_not_specialize=["num_segments"])
def _score_gradients_kernel(
    v,
    do,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    d_scores,
    scale,
    num_segments,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """dP (15) of one chunk and head."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = (i_row + o_t < tl.load(cu_seqlens + i_s + 1))[:, None]
    b_dP = tl.zeros([BT, BT], tl.float32)
    for i_v in range(0, V, BV):
        o_tv = o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t, other=0.0)  # [BT, BV]
        b_dP += tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_dP = tl.where(o_t[:, None] >= o_t[None, :], scale * b_dP, 0.0)
    p_dP = d_scores + (i_c.to(tl.int64) * H + i_h) * BT * BT + o_t[:, None] * BT + o_t[None, :]
    tl.store(p_dP, b_dP.to(d_scores.dtype.element_ty))


@triton.jit(do_not_specialize=["num_segments"])
def _row_gradients_kernel(
    q,
    k,
    g,
    u,
    w,
    d_decays,
    d_scores,
    whole_chunks,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    dq,
    dk,
    dg,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """Equations (16) to (19) for BK channels of one chunk and head that are whole."""
    i_kb, i_h, i_c, i_s = tile_of_chunk(chunk_segment, H, K // BK)
    i_chunk = i_c.to(tl.int64) * H + i_h
    # Of a slot past the last chunk the flag is meaningless.
    if (i_s >= num_segments) | (tl.load(whole_chunks + i_chunk) == 0):
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    o_t = tl.arange(0, BT)
    o_k = i_kb * BK + tl.arange(0, BK)
    m_t = (o_t < tl.load(cu_seqlens + i_s + 1) - i_row)[:, None]
    p_tk = (i_row.to(tl.int64) * H + i_h) * K + o_t[:, None] * (H * K) + o_k[None, :]
    p_dP = d_scores + i_chunk * BT * BT
    low = q.dtype.element_ty
    pair = d_scores.dtype.element_ty

    b_g = exponents(tl.load(g + p_tk, mask=m_t, other=0.0))  # [BT, BK]
    b_q = tl.load(q + p_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
    b_k = tl.load(k + p_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
    b_u = tl.load(u + p_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
    b_w = tl.load(w + p_tk, mask=m_t, other=0.0).to(tl.float32)  # [BT, BK]
    # k and w of the row before each row, for the sum over earlier rows in (19), which leaves a row's own term out.
    m_previous = m_t & (o_t > 0)[:, None]
    b_k_previous = tl.load(k - H * K + p_tk, mask=m_previous, other=0.0).to(tl.float32)  # [BT, BK]
    b_w_previous = tl.load(w - H * K + p_tk, mask=m_previous, other=0.0).to(tl.float32)  # [BT, BK]
    b_d_decays = tl.load(d_decays + i_chunk * K + o_k)  # [BK]
    b_diagonal = tl.load(p_dP + o_t * (BT + 1)).to(tl.float32)[:, None]  # [BT, 1]
    o_tt = o_t[:, None] * BT + o_t[None, :]
    b_dP = tl.load(p_dP + o_tt, mask=o_t[:, None] > o_t[None, :], other=0.0)  # [BT, BT]

    b_half = 0.5 * tl.sum(b_g, 0)  # [BK]
    b_c = tl.cumsum(b_g, 0) - b_half[None, :]
    b_from, b_to = tl.exp2(b_c), tl.exp2(-b_c)
    b_half = tl.exp2(b_half)[None, :]
    b_q_pair, b_k_pair = (b_q * b_from).to(pair), (b_k * b_to).to(pair)
    b_x = tl.dot(b_dP, b_k_pair, input_precision=PRECISION) + b_half * b_u
    b_y = tl.dot(tl.trans(b_dP), b_q_pair, input_precision=PRECISION)
    # (19). Both sums over a pair take the same rounded factors: the pairs of which both rows are in the sum cancel.
    b_later = b_q_pair.to(tl.float32) * b_x - b_k_pair.to(tl.float32) * b_y
    b_earlier = b_k_previous * b_w_previous * (b_half * b_to * tl.exp2(b_g))
    b_dg = tl.cumsum(b_later, 0, reverse=True) + tl.cumsum(b_earlier, 0) + b_d_decays[None, :]
    tl.store(dg + p_tk, b_dg.to(dg.dtype.element_ty), mask=m_t)
    tl.store(dq + p_tk, (b_from * b_x + b_diagonal * b_k).to(low), mask=m_t)
    tl.store(dk + p_tk, (b_to * (b_y + b_half * b_w) + b_diagonal * b_q).to(low), mask=m_t)


def local_gradients(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    chunks: Chunks,
    parts: StateParts,
    whole_chunks: torch.Tensor,
    launches_for=launches_for,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equations (15) to (17) and dg of every chunk.

    Args:
        inputs, chunks: of the same rows.
        do: [R, H, V], the gradient of o, contiguous.
        parts: from ``state_gradients``.
        whole_chunks: [N, H] int32, from ``chunk_local``.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        dq, dk, dg [R, H, K], in the types of q, k and g.
    """
    q = inputs.q
    launches = launches_for(q.device, q.dtype, inputs.k_dim, inputs.v_dim)
    d_scores = score_gradients(inputs, do, chunks, launches.score_gradients)
    gradients = torch.empty_like(q), torch.empty_like(inputs.k), torch.empty_like(inputs.g)
    tensors = parts, whole_chunks, d_scores, gradients
    row_gradients(inputs, chunks, *tensors, launch=launches.row_gradients)
    block_gradients(inputs, chunks, *tensors, launch=launches.block_gradients)
    return gradients


def score_gradients(inputs: Inputs, do: torch.Tensor, chunks: Chunks, launch: Launch) -> torch.Tensor:
    """dP of every chunk [N, H, BT, BT], float32 for float32 inputs, else bfloat16, whose range exp(c) takes."""
    v, heads, v_dim = inputs.v, inputs.num_heads, inputs.v_dim
    pair_type = v.dtype if v.dtype == torch.float32 else torch.bfloat16
    d_scores = torch.empty(chunks.num_slots, heads, CHUNK, CHUNK, dtype=pair_type, device=v.device)
    _score_gradients_kernel[(chunks.num_slots * heads,)](
        v=v,
        do=do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        d_scores=d_scores,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return d_scores


def row_gradients(inputs: Inputs, chunks: Chunks, *tensors, launch: Launch) -> None:
    """Writes dq, dk and dg of whole chunks and heads. tensors: as for :func:`gradient_arguments`."""
    programs = chunks.num_slots * inputs.num_heads * (inputs.k_dim // launch.tile)
    _row_gradients_kernel[(programs,)](**gradient_arguments(inputs, chunks, *tensors, launch))
