"""What every part of a segment adds to the state, and what the part leaves of the state before it.

Long segments are cut into parts, so that enough programs run. A part's state, from a start with zeros, follows from
(3) or (5) of `walk`; the walk over a later part (an earlier part, against time) adds up the states of the parts before.

Shape legend: segments S, heads H, sizes A of b, C of c, chunk length BT, parts P.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK
from mom_layers.recur.program_place_triton import part_of_program
from mom_layers.recur.scalar_decay.tensors import Cuts, PartStates
from mom_layers.recur.scalar_decay.triton.decays import decay_kind, decays_of_rows
from mom_layers.recur.scalar_decay.triton.launches import launches_for
from mom_layers.recur.scalar_decay.triton.walk import PRECISION
from mom_layers.recur.tiles_triton import tile_mask


@triton.jit(do_not_specialize=["num_segments", "part_chunks"])
def part_states_kernel(
    b,
    c,
    decays,
    cu_seqlens,
    chunk_offsets,
    part_segment,
    part_index,
    part_offsets,
    part_states,
    part_decays,
    scale,
    num_segments,
    part_chunks,
    H: tl.constexpr,
    A: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BA: tl.constexpr,
    BC: tl.constexpr,
    AGAINST_TIME: tl.constexpr,
    DECAY: tl.constexpr,
):
    """BC columns of what one part of a segment and head adds; nothing where no part follows."""
    TILES: tl.constexpr = (C + BC - 1) // BC
    i_tile, i_h, i_part, i_s = part_of_program(part_segment, H, TILES)
    if i_s >= num_segments:
        return
    i_index = tl.load(part_index + i_part)
    num_parts = tl.load(part_offsets + i_s + 1) - tl.load(part_offsets + i_s)
    if i_index == (0 if AGAINST_TIME else num_parts - 1):
        return
    i_first = tl.load(cu_seqlens + i_s) + i_index * part_chunks * BT
    num_rows = tl.minimum(tl.load(cu_seqlens + i_s + 1) - i_first, part_chunks * BT)
    num_chunks = tl.cdiv(num_rows, BT)
    i_slot = i_index * part_chunks
    if DECAY == "row":
        i_slot += tl.load(chunk_offsets + i_s)

    low = b.dtype.element_ty
    o_t = tl.arange(0, BT)
    o_a = tl.arange(0, BA)
    o_c = i_tile * BC + tl.arange(0, BC)
    o_ta = o_t[:, None] * (H * A) + o_a[None, :]
    o_tc = o_t[:, None] * (H * C) + o_c[None, :]
    b_M = tl.zeros([BA, BC], tl.float32)
    b_decay = tl.full([1], 1.0, tl.float32)
    for i in range(0, num_chunks):
        i_t = num_chunks - 1 - i if AGAINST_TIME else i
        valid = tl.minimum(num_rows - i_t * BT, BT)
        m_t = o_t < valid
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        b_b = tl.load(b + rows * A + o_ta, mask=tile_mask(m_t, o_a, A, BA), other=0.0)  # [BT, BA]
        b_c = tl.load(c + rows * C + o_tc, mask=tile_mask(m_t, o_c, C, BC * TILES), other=0.0)  # [BT, BC]
        i_chunk = (i_slot + i_t).to(tl.int64) * H + i_h
        b_from_start, b_to_end, decay = decays_of_rows(decays, i_chunk, i_h, valid, BT, DECAY)
        b_write = (b_c.to(tl.float32) * (scale * b_from_start if AGAINST_TIME else b_to_end)[:, None]).to(low)
        b_M = tl.dot(tl.trans(b_b), b_write, decay * b_M, input_precision=PRECISION)
        b_decay *= decay
    i_place = i_part.to(tl.int64) * H + i_h
    p_state = part_states + i_place * A * C + o_a[:, None] * C + o_c[None, :]
    tl.store(p_state, b_M, mask=tile_mask(o_a < A, o_c, C, BC * TILES))
    if i_tile == 0:
        tl.store(part_decays + i_place + tl.arange(0, 1), b_decay)


def part_states(
    *,
    b: torch.Tensor,
    c: torch.Tensor,
    decays: torch.Tensor | None,
    cuts: Cuts,
    scale: float,
    against_time: bool,
    launches_for=launches_for,
) -> PartStates:
    """Equation (3), or (5), of every part that another part follows, from a start with zeros.

    Args:
        b: [R, H, A], contiguous. c: [R, H, C], of the same type.
        decays, cuts, scale, against_time: as for `walk`.
        launches_for: a kernel set's, with fields as the general set's.
    """
    (_, heads, a_dim), c_dim = b.shape, c.shape[2]
    launch = launches_for(b.device, b.dtype, a_dim, c_dim).part_states
    states = torch.empty(cuts.num_parts, heads, a_dim, c_dim, dtype=torch.float32, device=b.device)
    part_decays = torch.empty(cuts.num_parts, heads, dtype=torch.float32, device=b.device)
    part_states_kernel[(cuts.num_parts * heads * triton.cdiv(c_dim, launch.tile),)](
        b=b,
        c=c,
        decays=decays,
        cu_seqlens=cuts.cu_seqlens,
        chunk_offsets=None if cuts.chunks is None else cuts.chunks.offsets,
        part_segment=cuts.parts.segment,
        part_index=cuts.parts.index,
        part_offsets=cuts.parts.offsets,
        part_states=states,
        part_decays=part_decays,
        scale=scale,
        num_segments=cuts.num_segments,
        part_chunks=cuts.part_chunks,
        H=heads,
        A=a_dim,
        C=c_dim,
        BT=CHUNK,
        BA=triton.next_power_of_2(a_dim),
        BC=launch.tile,
        AGAINST_TIME=against_time,
        DECAY=decay_kind(decays),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return PartStates(states, part_decays)
