"""The recurrence from chunk to chunk, with time or against it: outputs, and each of the gradients of q, k and v.

For rows a_i, b_i and c_i, the walk computes with time

    (2)  out_i = scale * (exp(G_i) a_i M + sum_{j <= i} exp(G_i - G_j) (a_i . b_j) c_j)
    (3)  M <- exp(G_last) M + sum_j exp(G_last - G_j) b_j c_j^T

and against time, where the state after a chunk comes first,

    (4)  out_j = exp(G_last - G_j) a_j M + scale * sum_{i >= j} exp(G_i - G_j) (a_j . b_i) c_i
    (5)  M <- exp(G_last) M + scale * sum_i exp(G_i) b_i c_i^T

so that one kernel serves four times. S is the state, dS the gradient of the state:

    out  time     a   b   c   M
    o    with     q   k   v   S    [K, V]
    dq   with     do  v   k   S^T  [V, K]
    dk   against  v   do  q   dS^T [V, K]
    dv   against  k   q   do  dS   [K, V]

A chunk's own rows are added one step late: the scores of a chunk are carried to the next step. Left operands of large
products must come from shared memory and not from registers (ptxas of CUDA 12.8 and 12.9 miscompiles Hopper's
asynchronous products with operands in registers, Triton pull request 11781), and Triton puts loaded and carried
operands there. So the scores need no memory, and no product waits for them.

Shape legend: rows R, segments S, heads H, sizes A of a and b, C of c, chunk length BT, parts P, span slots M,
chunk slots N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.chunks import SPAN
from mom_layers.recur.program_place_triton import part_of_program
from mom_layers.recur.scalar_decay.tensors import Cuts, DecayTerms, PartStates
from mom_layers.recur.scalar_decay.triton.decays import decay_kind, decays_between, decays_of_rows
from mom_layers.recur.scalar_decay.triton.launches import launches_for
from mom_layers.recur.tiles_triton import finished, has_asynchronous_products, tile_mask

# Products of float32 inputs are exact in float32: no tf32. Other types ignore it.
PRECISION = tl.constexpr("ieee")


@triton.jit
def state_offsets(o_a, o_c, A: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Where the elements of a tile lie in a state [A, C], or in one that is stored as [C, A]."""
    if TRANSPOSED:
        return o_c[None, :] * A + o_a[:, None]
    else:
        return o_a[:, None] * C + o_c[None, :]


@triton.jit(do_not_specialize=["num_segments", "num_slots", "part_chunks"])
def walk_kernel(
    a,
    b,
    c,
    decays,
    cu_seqlens,
    chunk_offsets,
    span_offsets,
    part_segment,
    part_index,
    part_offsets,
    first_state,
    part_states,
    part_decays,
    out,
    last_state,
    reader,
    row_terms,
    totals,
    span_states,
    decayed_state,
    boundary,
    scale,
    num_segments,
    num_slots,
    part_chunks,
    H: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BLOCKS: tl.constexpr,
    BC: tl.constexpr,
    SPAN: tl.constexpr,
    AGAINST_TIME: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DECAY: tl.constexpr,
    HAS_FIRST_STATE: tl.constexpr,
    IN_PARTS: tl.constexpr,
    STORE_LAST_STATE: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_DECAYED_STATE: tl.constexpr,
    ASYNCHRONOUS: tl.constexpr,
):
    """BC columns of the state along one part of a segment and head."""
    TILES: tl.constexpr = (C + BC - 1) // BC
    i_tile, i_h, i_part, i_s = part_of_program(part_segment, H, TILES)
    if i_s >= num_segments:
        return
    i_index = tl.load(part_index + i_part)
    i_first_part = tl.load(part_offsets + i_s)
    num_parts = tl.load(part_offsets + i_s + 1) - i_first_part
    i_first = tl.load(cu_seqlens + i_s) + i_index * part_chunks * BT
    segment_left = tl.load(cu_seqlens + i_s + 1) - i_first
    num_rows = tl.minimum(segment_left, part_chunks * BT)
    num_chunks = tl.cdiv(num_rows, BT)
    i_slot = i_index * part_chunks
    if DECAY == "row":
        i_slot += tl.load(chunk_offsets + i_s)
    if TERMS:
        i_spans = tl.load(span_offsets + i_s)

    low = a.dtype.element_ty
    o_t = tl.arange(0, BT)
    o_a = tl.arange(0, BA)
    o_c = i_tile * BC + tl.arange(0, BC)
    o_ta = o_t[:, None] * (H * A) + o_a[None, :]
    o_tc = o_t[:, None] * (H * C) + o_c[None, :]
    o_ac = state_offsets(o_a, o_c, A, C, TRANSPOSED)
    NEXT: tl.constexpr = BA if TRANSPOSED else BA * C  # from the first block of a state's rows to the second
    m_ac = tile_mask(o_a < A, o_c, C, BC * TILES)
    m_next = tile_mask(BA + o_a < A, o_c, C, BC * TILES)
    i_state = (i_s.to(tl.int64) * H + i_h) * A * C

    # The state's rows, or the first half; b_N has the other half, and is not read where there is none.
    b_M = tl.zeros([BA, BC], tl.float32)
    b_N = tl.zeros([BA if BLOCKS == 2 else 1, BC], tl.float32)
    if HAS_FIRST_STATE:
        b_M += tl.load(first_state + i_state + o_ac, mask=m_ac, other=0.0).to(tl.float32)
        if BLOCKS == 2:
            b_N += tl.load(first_state + i_state + o_ac + NEXT, mask=m_next, other=0.0).to(tl.float32)
    if IN_PARTS:
        num_earlier = num_parts - 1 - i_index if AGAINST_TIME else i_index
        for i in range(0, num_earlier):
            i_earlier = (i_first_part + (num_parts - 1 - i if AGAINST_TIME else i)).to(tl.int64) * H + i_h
            decay = tl.load(part_decays + i_earlier)
            b_M = decay * b_M + tl.load(part_states + i_earlier * A * C + o_ac, mask=m_ac, other=0.0)
            if BLOCKS == 2:
                b_part = tl.load(part_states + i_earlier * A * C + o_ac + NEXT, mask=m_next, other=0.0)
                b_N = decay * b_N + b_part

    b_P = tl.zeros([BT, BT], low)
    b_products = tl.zeros([BT, BT], tl.float32)
    b_before = tl.zeros([BT, BC], low)
    b_out = tl.zeros([BT, BC], tl.float32)
    # A step takes a block of the columns of a and b. The last step adds the last chunk's own rows, and has no chunk.
    for i_step in range(0, num_chunks * BLOCKS + 1):
        i, i_block = i_step // BLOCKS, i_step % BLOCKS
        i_t = num_chunks - 1 - i if AGAINST_TIME else i
        valid = tl.where(i < num_chunks, tl.minimum(num_rows - i_t * BT, BT), 0)
        m_t = o_t < valid
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_slot + i_t).to(tl.int64) * H + i_h
        m_ta = tile_mask(m_t, i_block * BA + o_a, A, BA * BLOCKS)
        m_tc = tile_mask(m_t, o_c, C, BC * TILES)
        p_ta = rows * A + i_block * BA + o_ta
        b_a = tl.load(a + p_ta, mask=m_ta, other=0.0)  # [BT, BA]
        b_b = tl.load(b + p_ta, mask=m_ta, other=0.0)  # [BT, BA]
        b_c = tl.load(c + rows * C + o_tc, mask=m_tc, other=0.0)  # [BT, BC]
        b_from_start, b_to_end, decay = decays_of_rows(decays, i_chunk, i_h, valid, BT, DECAY)
        b_M_low = b_M.to(low)

        if TERMS:
            # Where spans meet, for g's gradient: S, or its product with dS.
            i_place = i_index * part_chunks + i_t
            i_span = (i_spans + i_place // SPAN).to(tl.int64) * H + i_h
            o_span = i_block * (BA * C) + state_offsets(o_a, o_c, A, C, False)
            m_span = tile_mask(i_block * BA + o_a < A, o_c, C, BC * TILES)
            if AGAINST_TIME:
                if (valid > 0) & ((i_place % SPAN == SPAN - 1) | (i_t * BT + BT >= segment_left)):
                    if i_t * BT + BT < segment_left:
                        b_S = tl.load(span_states + (i_span + H) * A * C + o_span, mask=m_span, other=0.0)
                        product = tl.sum(b_S.to(tl.float32) * b_M)
                    elif HAS_DECAYED_STATE:
                        b_S = tl.load(decayed_state + i_state + o_span, mask=m_span, other=0.0)
                        product = tl.sum(b_S.to(tl.float32) * b_M)
                    else:
                        product = 0.0
                    tl.store(boundary + (i_span * TILES + i_tile) * BLOCKS + i_block, product)
            else:
                if (valid > 0) & (i_place % SPAN == 0):
                    tl.store(span_states + i_span * A * C + o_span, b_M_low, mask=m_span)
                if HAS_DECAYED_STATE:
                    if (valid > 0) & (i_t * BT + BT >= segment_left):
                        tl.store(decayed_state + i_state + o_span, (decay * b_M).to(low), mask=m_span)

        # The chunk before this one: the sum of (2) or (4), of its own rows.
        if i_block == 0:
            b_whole = tl.dot(b_P, b_before, b_out, input_precision=PRECISION)
            step = -BT if AGAINST_TIME else BT
            m_before = (o_t < num_rows - (i_t * BT - step)) & (i > 0)
            m_before = tile_mask(m_before, o_c, C, BC * TILES)
            tl.store(out + (rows - step * H) * C + o_tc, b_whole.to(low), mask=m_before)

        # This chunk: what the state gives, and the scores.
        if BLOCKS == 1:
            b_out = tl.dot(b_a, b_M_low, input_precision=PRECISION)
            b_products = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
        else:
            b_out = tl.dot(b_a, b_M_low, tl.where(i_block > 0, b_out, 0.0), input_precision=PRECISION)
            b_products = tl.where(i_block > 0, b_products, 0.0)
            b_products = tl.dot(b_a, tl.trans(b_b), b_products, input_precision=PRECISION)
        if i_block == BLOCKS - 1:
            b_out *= (b_to_end if AGAINST_TIME else scale * b_from_start)[:, None]
            b_between = decays_between(decays, i_chunk, i_h, valid, BT, DECAY)
            b_P = (b_products * (scale * (tl.trans(b_between) if AGAINST_TIME else b_between))).to(low)
            if TERMS:
                b_reader = tl.load(reader + rows * C + o_tc, mask=m_tc, other=0.0).to(tl.float32)
                b_term = tl.sum(b_reader * b_out, 1)
                i_term = (num_slots.to(tl.int64) * H if AGAINST_TIME else 0) + i_chunk
                tl.store(row_terms + (i_term * TILES + i_tile) * BT + o_t, b_term, mask=valid > o_t * 0)
                tl.store(totals + i_term * TILES + i_tile, tl.sum(b_term), mask=valid > 0)

        # Equation (3) or (5).
        b_before = b_c
        b_write = (b_c.to(tl.float32) * (scale * b_from_start if AGAINST_TIME else b_to_end)[:, None]).to(low)
        b_M = tl.dot(tl.trans(b_b), b_write, decay * b_M, input_precision=PRECISION)
        if BLOCKS == 2:
            if DECAY == "none":
                b_M = finished(b_M, i_step, ASYNCHRONOUS)  # the product has read c itself
            # The halves change places. The mask changes nothing; without it the compiler would pipeline no load.
            b_M, b_N = tl.where(i_step >= 0, b_N, 0.0), b_M

    if STORE_LAST_STATE:
        if i_index == (0 if AGAINST_TIME else num_parts - 1):
            # The last step was one more than whole rounds of the blocks: the halves have changed places.
            if BLOCKS == 2:
                b_M, b_N = b_N, b_M
                tl.store(last_state + i_state + o_ac + NEXT, b_N, mask=m_next)
            tl.store(last_state + i_state + o_ac, b_M, mask=m_ac)


def walk(
    *,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    decays: torch.Tensor | None,
    cuts: Cuts,
    scale: float,
    against_time: bool,
    transposed: bool = False,
    first_state: torch.Tensor | None = None,
    part_states: PartStates | None = None,
    last_state: torch.Tensor | None = None,
    reader: torch.Tensor | None = None,
    terms: DecayTerms | None = None,
    launches_for=launches_for,
) -> torch.Tensor:
    """Equations (2) and (3), or (4) and (5), along every segment.

    Args:
        a, b: [R, H, A], contiguous. c: [R, H, C], of the same type.
        decays: from `chunk_decays`.
        cuts: of the same rows.
        against_time: (4) and (5).
        transposed: the states that are given and stored are [C, A], not [A, C].
        first_state: [S, H, A, C] float32 before the first row (after the last row, against time); zeros when absent.
        part_states: of every part, where segments are cut into parts.
        last_state: [S, H, A, C] float32; filled with the state at the other end. Empty segments are left out.
        reader: [R, H, C], q or k, of which ``terms`` hold sums.
        terms: filled with sums for the decay's gradient; None where the decay has none.
        launches_for: a kernel set's, with fields as the general set's.

    Returns:
        out [R, H, C].
    """
    (_, heads, a_dim), c_dim = a.shape, c.shape[2]
    launches = launches_for(a.device, a.dtype, a_dim, c_dim)
    launch = launches.walk if terms is None else launches.walk_with_terms
    out = torch.empty_like(c)
    walk_kernel[(cuts.num_parts * heads * triton.cdiv(c_dim, launch.tile),)](
        a=a,
        b=b,
        c=c,
        decays=decays,
        cu_seqlens=cuts.cu_seqlens,
        chunk_offsets=None if cuts.chunks is None else cuts.chunks.offsets,
        span_offsets=None if terms is None else terms.spans.offsets,
        part_segment=cuts.parts.segment,
        part_index=cuts.parts.index,
        part_offsets=cuts.parts.offsets,
        first_state=first_state,
        part_states=None if part_states is None else part_states.states,
        part_decays=None if part_states is None else part_states.decays,
        out=out,
        last_state=last_state,
        reader=reader,
        row_terms=None if terms is None else terms.row_terms,
        totals=None if terms is None else terms.totals,
        span_states=None if terms is None else terms.span_states,
        decayed_state=None if terms is None else terms.decayed_state,
        boundary=None if terms is None else terms.boundary,
        scale=scale,
        num_segments=cuts.num_segments,
        num_slots=cuts.num_slots,
        part_chunks=cuts.part_chunks,
        H=heads,
        A=a_dim,
        C=c_dim,
        BT=CHUNK,
        BA=triton.next_power_of_2(a_dim) // launch.blocks,
        BLOCKS=launch.blocks,
        BC=launch.tile,
        SPAN=SPAN,
        AGAINST_TIME=against_time,
        TRANSPOSED=transposed,
        DECAY=decay_kind(decays),
        HAS_FIRST_STATE=first_state is not None,
        IN_PARTS=part_states is not None,
        STORE_LAST_STATE=last_state is not None,
        TERMS=terms is not None,
        HAS_DECAYED_STATE=terms is not None and terms.decayed_state is not None,
        ASYNCHRONOUS=has_asynchronous_products(a.device),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return out
