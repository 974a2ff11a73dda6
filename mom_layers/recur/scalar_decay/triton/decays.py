"""The decays of a chunk, for the three kinds of decay: one a row and head, a fixed one a head, or none.

With G the sum of g from the chunk's first row on:

    (1)  exp(G_i - G_j)    exp(G)    exp(G_last - G)    exp(G_last)

A fixed decay has G_i = (i + 1) g, and costs no memory. For a decay a row, G is summed once for all kernels.

Shape legend: rows R, segments S, heads H, chunk length BT, chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp
from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.decays_triton import between, sums_of_decays
from mom_layers.recur.program_place_triton import chunk_of_program
from mom_layers.recur.scalar_decay.tensors import Cuts, Inputs


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_decays_kernel(
    g, cu_seqlens, chunk_segment, chunk_index, decays, num_segments, H: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """The two parts of G, exp(G) and exp(G_last - G) of one chunk and head."""
    i_c, i_h, i_s = chunk_of_program(chunk_segment, H)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    b_g = tl.load(g + i_row.to(tl.int64) * H + i_h + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    b_high, b_low = sums_of_decays(b_g)
    # Summed from the end: the total less G would lose a small sum beside a large total.
    m_next = (o_t + 1 < BT) & (i_row + o_t + 1 < tl.load(cu_seqlens + i_s + 1))
    b_next = tl.load(g + (i_row.to(tl.int64) + 1) * H + i_h + o_t * H, mask=m_next, other=0.0).to(tl.float32)
    p_chunk = decays + (i_c.to(tl.int64) * H + i_h) * 4 * BT + o_t
    tl.store(p_chunk, b_high)
    tl.store(p_chunk + BT, b_low)
    tl.store(p_chunk + 2 * BT, exp(b_high))
    tl.store(p_chunk + 3 * BT, exp(tl.cumsum(b_next, 0, reverse=True)))


def chunk_decays(*, inputs: Inputs, cuts: Cuts) -> torch.Tensor | None:
    """Equation (1) for a decay a row: [N, H, 4, BT] float32, the two parts of G, exp(G) and exp(G_last - G).

    A fixed decay comes back as it is, [H], and no decay as None.
    """
    g = inputs.g
    if not inputs.decay_by_row:
        return g
    heads = g.shape[1]
    decays = torch.empty(cuts.num_slots, heads, 4, CHUNK, dtype=torch.float32, device=g.device)
    _chunk_decays_kernel[(cuts.num_slots * heads,)](
        g=g,
        cu_seqlens=cuts.cu_seqlens,
        chunk_segment=cuts.chunks.segment,
        chunk_index=cuts.chunks.index,
        decays=decays,
        num_segments=cuts.num_segments,
        H=heads,
        BT=CHUNK,
        num_warps=1,
    )
    return decays


def decay_kind(decays: torch.Tensor | None) -> str:
    """How kernels name the kind: "none", "head" or "row"."""
    return "none" if decays is None else "head" if decays.dim() == 1 else "row"


@triton.jit
def decays_between(decays, i_chunk, i_h, valid, BT: tl.constexpr, DECAY: tl.constexpr):
    """exp(G_i - G_j) [BT, BT], zero above the diagonal. ``i_chunk`` is read where ``valid`` rows are not 0."""
    o_t = tl.arange(0, BT)
    if DECAY == "row":
        p_chunk = decays + i_chunk * 4 * BT + o_t
        b_high = tl.load(p_chunk, mask=valid > o_t * 0, other=0.0)
        b_low = tl.load(p_chunk + BT, mask=valid > o_t * 0, other=0.0)
        return between(b_high, b_low)
    else:
        distance = (o_t[:, None] - o_t[None, :]).to(tl.float32)
        if DECAY == "head":
            b_exp = exp(tl.load(decays + i_h).to(tl.float32) * tl.maximum(distance, 0.0))
            return tl.where(distance >= 0, b_exp, 0.0)
        else:
            return tl.where(distance >= 0, 1.0, 0.0)


@triton.jit
def decays_of_rows(decays, i_chunk, i_h, valid, BT: tl.constexpr, DECAY: tl.constexpr):
    """exp(G) [BT], exp(G_last - G) [BT] and exp(G_last) of a chunk with ``valid`` rows; 1 where there are none."""
    o_t = tl.arange(0, BT)
    if DECAY == "row":
        p_chunk = decays + i_chunk * 4 * BT + 2 * BT
        b_from_start = tl.load(p_chunk + o_t, mask=valid > o_t * 0, other=1.0)
        b_to_end = tl.load(p_chunk + BT + o_t, mask=valid > o_t * 0, other=1.0)
        return b_from_start, b_to_end, tl.load(p_chunk + BT - 1, mask=valid > 0, other=1.0)
    elif DECAY == "head":
        b_g = tl.load(decays + i_h).to(tl.float32)
        b_left = tl.maximum(valid - 1 - o_t, 0).to(tl.float32)
        return exp(b_g * (o_t + 1).to(tl.float32)), exp(b_g * b_left), exp(b_g * valid.to(tl.float32))
    else:
        b_one = tl.full([BT], 1.0, tl.float32)
        return b_one, b_one, 1.0
