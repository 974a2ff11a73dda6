"""The gradients that a chunk's rows of the values' side give each other.

Names as in `recurrence` and `reverse_recurrence`:

    (14)  dP = scale * lower(do e^T)
    (15)  dA = -strictly_lower(y e^T)             through (8): e = (I + A)^-1 r
    (16)  dv = write * y
    (17)  d_write = v * y, summed over V where write is a number a head

Shape legend: rows R, heads H, value size V, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.channel_delta.tensors import ErrorRows, Inputs, ScoreGradients, Values
from mom_layers.recur.channel_delta.triton.launches import launches_for
from mom_layers.recur.channel_delta.triton.levels import PRECISION
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import Chunks
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.tiles_triton import finished, has_asynchronous_products


@triton.jit(do_not_specialize=["num_segments"])
def _score_gradients_kernel(
    v,
    write,
    errors,
    d_errors,
    do,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    d_scores,
    d_key_scores,
    dv,
    d_write,
    scale,
    num_segments,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    WRITE_CHANNELS: tl.constexpr,
    ASYNCHRONOUS: tl.constexpr,
):
    """Equations (14) to (17) of one chunk and head."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    rows = i_row.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    b_dP = tl.zeros([BT, BT], tl.float32)
    b_dA = tl.zeros([BT, BT], tl.float32)
    if not WRITE_CHANNELS:
        b_write = tl.load(write + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_d_write = tl.zeros([BT], tl.float32)
    for i_v in range(0, V, BV):
        p_tv = rows * V + o_t[:, None] * (H * V) + i_v + tl.arange(0, BV)[None, :]
        b_do = tl.load(do + p_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_y = tl.load(d_errors + p_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_e = tl.load(errors + p_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_dP += tl.dot(b_do, tl.trans(b_e), input_precision=PRECISION)
        b_dA += tl.dot(b_y, tl.trans(b_e), input_precision=PRECISION)
        b_dP, b_dA = finished(b_dP, i_v, ASYNCHRONOUS), finished(b_dA, i_v, ASYNCHRONOUS)
        b_v = tl.load(v + p_tv, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BV]
        b_v_y = b_v * b_y.to(tl.float32)
        if WRITE_CHANNELS:
            b_write = tl.load(write + p_tv, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BV]
            tl.store(d_write + p_tv, b_v_y.to(d_write.dtype.element_ty), mask=m_t[:, None])
        else:
            b_d_write += tl.sum(b_v_y, 1)
        tl.store(dv + p_tv, (b_write * b_y.to(tl.float32)).to(dv.dtype.element_ty), mask=m_t[:, None])
    if not WRITE_CHANNELS:
        tl.store(d_write + rows + o_t * H, b_d_write, mask=m_t)
    p_tt = (i_c.to(tl.int64) * H + i_h) * BT * BT + o_t[:, None] * BT + o_t[None, :]
    b_dP = tl.where(o_t[:, None] >= o_t[None, :], scale * b_dP, 0.0)
    b_dA = tl.where(o_t[:, None] > o_t[None, :], -b_dA, 0.0)
    tl.store(d_scores + p_tt, b_dP.to(d_scores.dtype.element_ty))
    tl.store(d_key_scores + p_tt, b_dA.to(d_key_scores.dtype.element_ty))


def score_gradients(
    *, inputs: Inputs, values: Values, rows: ErrorRows, chunks: Chunks, launches_for=launches_for
) -> ScoreGradients:
    """Equations (14) to (17) of every chunk.

    Args:
        inputs, values, rows, chunks: of the same rows.
        launches_for: a kernel set's, with fields as the general set's.
    """
    v, (_, heads, v_dim) = values.v, values.v.shape
    pair_type = torch.float32 if v.dtype == torch.float32 else torch.bfloat16
    d_scores = torch.empty(chunks.num_slots, heads, CHUNK, CHUNK, dtype=pair_type, device=v.device)
    write_type = values.write.dtype if values.writes_channels else torch.float32
    gradients = ScoreGradients(
        d_scores, torch.empty_like(d_scores), torch.empty_like(v), torch.empty_like(values.write, dtype=write_type)
    )
    launch = launches_for(v.device, v.dtype, inputs.k_dim, v_dim).score_gradients
    _score_gradients_kernel[(chunks.num_slots * heads,)](
        v=v,
        write=values.write,
        errors=rows.errors,
        d_errors=rows.d_errors,
        do=rows.do,
        cu_seqlens=chunks.cu_seqlens,
        chunk_segment=chunks.table.segment,
        chunk_index=chunks.table.index,
        d_scores=gradients.d_scores,
        d_key_scores=gradients.d_key_scores,
        dv=gradients.dv,
        d_write=gradients.d_write,
        scale=inputs.scale,
        num_segments=chunks.num_segments,
        H=heads,
        V=v_dim,
        BT=CHUNK,
        BV=launch.tile,
        WRITE_CHANNELS=values.writes_channels,
        ASYNCHRONOUS=has_asynchronous_products(v.device),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return gradients
