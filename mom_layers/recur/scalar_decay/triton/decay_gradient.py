"""The gradient of a decay that is one number a row and head.

    (6)  E_ij = scale * exp(G_i - G_j) (q_i . k_j) (do_i . v_j)    j < i
    (7)  dg_t = sum_{i >= t} (q_i . dq_i + sum_j E_ij - sum_j E_ji) + sum_{i < t} k_i . dk_i + exp(G_last) <S, dS>

with the parts of dq and dk that come through the states. Terms without decay (i = j) are left out and not cancelled:
under strong decay they would bury dg.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, span slots M.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN
from mom_layers.recur.decays_triton import decay_through_chunk
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.scalar_decay.tensors import Cuts, DecayTerms, Inputs
from mom_layers.recur.scalar_decay.triton.decays import decays_between
from mom_layers.recur.scalar_decay.triton.launches import launches_for
from mom_layers.recur.scalar_decay.triton.walk import PRECISION
from mom_layers.recur.tiles_triton import tile_mask


@triton.jit
def _products(a, b, rows, m_t, H: tl.constexpr, A: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr):
    """a_i . b_j of a chunk's rows, [BT, BT], BA columns at a time."""
    o_t = tl.arange(0, BT)
    b_product = tl.zeros([BT, BT], tl.float32)
    for i_a in range(0, A, BA):
        o_a = i_a + tl.arange(0, BA)
        o_ta = o_t[:, None] * (H * A) + o_a[None, :]
        m_ta = tile_mask(m_t, o_a, A, (A + BA - 1) // BA * BA)
        b_a = tl.load(a + rows * A + o_ta, mask=m_ta, other=0.0)  # [BT, BA]
        b_b = tl.load(b + rows * A + o_ta, mask=m_ta, other=0.0)  # [BT, BA]
        b_product = tl.dot(b_a, tl.trans(b_b), b_product, input_precision=PRECISION)
    return b_product


@triton.jit(do_not_specialize=["num_segments", "num_slots"])
def _decay_gradient_kernel(
    q,
    k,
    v,
    do,
    decays,
    row_terms,
    totals,
    boundary,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    chunk_offsets,
    span_offsets,
    dg,
    scale,
    num_segments,
    num_slots,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SPAN: tl.constexpr,
    TILES: tl.constexpr,
    BOUNDARY_TILES: tl.constexpr,
    FROM_ZERO: tl.constexpr,
):
    """Equations (6) and (7) of one chunk and head."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_index = tl.load(chunk_index + i_c)
    i_row = tl.load(cu_seqlens + i_s) + i_index * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h

    # Equation (6).
    b_E = _products(q, k, rows, m_t, H, K, BT, BK) * _products(do, v, rows, m_t, H, V, BT, BV)
    b_E *= scale * decays_between(decays, i_chunk, i_h, BT, BT, "row")
    b_E = tl.where(o_t[:, None] > o_t[None, :], b_E, 0.0)
    # Equation (7).
    b_later = tl.sum(b_E, 1) - tl.sum(b_E, 0)
    b_earlier = tl.zeros([BT], tl.float32)
    p_terms = row_terms + i_chunk * TILES * BT + o_t
    p_written = p_terms + num_slots.to(tl.int64) * H * TILES * BT
    for i_tile in tl.static_range(TILES):
        b_later += tl.load(p_terms + i_tile * BT)
        b_earlier += tl.load(p_written + i_tile * BT)
    through = decay_through_chunk(
        totals, boundary, chunk_offsets, span_offsets, i_c, i_s, i_h, i_index, num_slots,
        H, SPAN, TILES, BOUNDARY_TILES, FROM_ZERO,
    )  # fmt: skip
    b_dg = tl.sum(tl.where(o_t[:, None] >= o_t[None, :], b_later[:, None], b_earlier[:, None]), 0) + through
    tl.store(dg + rows + o_t * H, b_dg.to(dg.dtype.element_ty), mask=m_t)


def decay_gradient(
    *,
    inputs: Inputs,
    do: torch.Tensor,
    decays: torch.Tensor,
    cuts: Cuts,
    terms: DecayTerms,
    from_zero: bool,
    launches_for=launches_for,
) -> torch.Tensor:
    """Equations (6) and (7) of every chunk.

    Args:
        inputs, decays, cuts: of the same rows; the decay is one a row.
        do: [R, H, V], the gradient of o, contiguous.
        terms: what the walks of dq and of dk stored.
        from_zero: there was no initial state.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        dg [R, H] in g's type.
    """
    q, heads, k_dim, v_dim = inputs.q, inputs.q.shape[1], inputs.q.shape[2], inputs.v.shape[2]
    dg = torch.empty_like(inputs.g)
    launch = launches_for(q.device, q.dtype, k_dim, v_dim).decay_gradient
    _decay_gradient_kernel[(cuts.num_slots * heads,)](
        q=q,
        k=inputs.k,
        v=inputs.v,
        do=do,
        decays=decays,
        row_terms=terms.row_terms,
        totals=terms.totals,
        boundary=terms.boundary,
        cu_seqlens=cuts.cu_seqlens,
        chunk_segment=cuts.chunks.segment,
        chunk_index=cuts.chunks.index,
        chunk_offsets=cuts.chunks.offsets,
        span_offsets=terms.spans.offsets,
        dg=dg,
        scale=inputs.scale,
        num_segments=cuts.num_segments,
        num_slots=cuts.num_slots,
        H=heads,
        K=k_dim,
        V=v_dim,
        BT=CHUNK,
        BK=min(launch.tile, triton.next_power_of_2(k_dim)),
        BV=min(launch.tile, triton.next_power_of_2(v_dim)),
        SPAN=SPAN,
        TILES=terms.totals.shape[3],
        BOUNDARY_TILES=terms.boundary.shape[2],
        FROM_ZERO=from_zero,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return dg
