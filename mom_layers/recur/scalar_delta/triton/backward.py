"""Backward kernels of the gated delta rule that walk along the state; names and equations as in the forward file.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N, group slots M.

With dS the gradient of the state after the chunk, a chunk of the reverse recurrence is

    z = scale * P^T do + exp(G_last - G) * (k dS)         gradient of beta * e
    y = z - X^T (beta * z)                                the transposed solve: gradient of beta * r
    dS <- exp(G_last) dS + q^T (scale * exp(G) * do) - k^T (exp(G) * beta * y)

Once e and y are known, neither S nor dS needs a solve any more: both are sums, over any columns of K and from any state
on. So they are never stored for every chunk: from one of them a group, both are computed again, in tiles of K, by
programs that share nothing, and what they owe to the gradients is taken on the way:

    from_state_q = scale * exp(G) * (do S^T)              part of dq
    from_state_k = -exp(G) * beta * (y S^T)               part of dk
    to_state_k   = exp(G_last - G) * beta * (e dS^T)      part of dk

The decay of a whole chunk owes exp(G_last) <S, dS> to g, with the S before and the dS after it. Those two never meet,
but their neighbours' products do: <S, dS> at a chunk's start is that plus the sum of q * from_state_q and
k * from_state_k, and <S, dS> at its end is that plus the sum of k * to_state_k. So it follows, chunk by chunk, from
<S, dS> where the group ends. After a segment's last chunk, where nothing need have decayed, only the decayed part of S
is taken: the rest would have to cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK, GROUP, ChunkTable
from mom_layers.recur.scalar_delta.hopper import reverse_recurrence as hopper_reverse_recurrence
from mom_layers.recur.scalar_delta.hopper import states as hopper_states
from mom_layers.recur.scalar_delta.hopper.tiles import tiles
from mom_layers.recur.scalar_delta.launch import recurrence_launch, state_gradients_launch
from mom_layers.recur.scalar_delta.triton.forward import PRECISION


@triton.jit
def _reverse_recurrence_kernel(
    q,
    k,
    beta,
    gates,
    solved,
    scores,
    do,
    cu_seqlens,
    chunk_offsets,
    group_offsets,
    checkpoints,
    decayed_state,
    d_final_state,
    d_initial_state,
    d_checkpoints,
    d_errors,
    boundary,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_D_FINAL_STATE: tl.constexpr,
    STORE_D_INITIAL_STATE: tl.constexpr,
):
    """BV columns of dS along one segment and head, from its last chunk to its first. Stores y, and where a group of
    chunks ends dS and these columns' part of <S, dS>."""
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = (tl.num_programs(0) - 1 - tl.program_id(0)) // (V // BV) // H
    i_first = tl.load(cu_seqlens + i_s)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = tl.cdiv(num_rows, BT)
    i_first_chunk = tl.load(chunk_offsets + i_s)

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = k.dtype.element_ty

    if HAS_D_FINAL_STATE:
        b_dS = tl.load(d_final_state + i_state + o_kv).to(tl.float32)  # [K, BV]
        b_decayed = tl.load(decayed_state + i_state + o_kv, mask=num_rows > 0, other=0.0).to(tl.float32)  # [K, BV]
        last_boundary = tl.sum(tl.sum(b_decayed * b_dS, 1), 0)
    else:
        b_dS = tl.zeros([K, BV], tl.float32)
        last_boundary = tl.sum(tl.zeros([BT], tl.float32), 0)
    for i_back in range(0, num_chunks):
        i_t = num_chunks - 1 - i_back
        m_t = i_t * BT + o_t < num_rows
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_first_chunk + i_t).to(tl.int64) * H + i_h
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, BV]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(gates + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(gates + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(gates + i_chunk * 2 * BT + BT - 1)
        b_X = tl.load(solved + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]

        b_dS_low = b_dS.to(low)
        if (i_t % GROUP == GROUP - 1) | (i_back == 0):
            i_group = (tl.load(group_offsets + i_s) + i_t // GROUP).to(tl.int64) * H + i_h
            tl.store(d_checkpoints + i_group * K * V + o_kv, b_dS_low)
            product = last_boundary
            if i_back > 0:
                b_S = tl.load(checkpoints + (i_group + H) * K * V + o_kv).to(tl.float32)  # [K, BV]
                product = tl.sum(tl.sum(b_S * b_dS, 1), 0)
            tl.store(boundary + i_group * (V // BV) + i_v, product)
        b_z = scale * tl.dot(tl.trans(b_P), b_do, input_precision=PRECISION)
        b_z += b_to_end * tl.dot(b_k, b_dS_low, input_precision=PRECISION)
        b_y = b_z - tl.dot(tl.trans(b_X), (b_beta * b_z).to(low), input_precision=PRECISION)
        tl.store(d_errors + rows * V + o_tv, b_y.to(low), mask=m_t[:, None])

        b_dS = chunk_decay * b_dS
        b_k_side = (-b_from_start * b_beta * b_y).to(low)
        b_dS += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_q_side = (scale * b_from_start * b_do.to(tl.float32)).to(low)
        b_dS += tl.dot(tl.trans(b_q), b_q_side, input_precision=PRECISION)
    if STORE_D_INITIAL_STATE:
        tl.store(d_initial_state + i_state + o_kv, b_dS)


@triton.jit(do_not_specialize=["num_segments"])
def _state_gradients_kernel(
    q,
    k,
    beta,
    gates,
    errors,
    d_errors,
    do,
    states,
    cu_seqlens,
    chunk_offsets,
    group_segment,
    group_index,
    dq,
    dk,
    row_terms,
    totals,
    scale,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """BK rows of S along one group of chunks and head, or of dS against time: what they owe to dq and dk.

    The reverse direction writes dk; the other one, launched after it, writes dq and adds to dk. Both write the sums
    over these rows of S that g's gradient needs: a token's, and a chunk's.
    """
    i_kb = tl.program_id(0) % (K // BK)
    i_h = tl.program_id(0) // (K // BK) % H
    i_g = tl.program_id(0) // (K // BK) // H
    i_s = tl.load(group_segment + i_g)
    if i_s >= num_segments:
        return
    i_first_chunk = tl.load(group_index + i_g) * GROUP
    i_first = tl.load(cu_seqlens + i_s) + i_first_chunk * BT
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    num_chunks = tl.minimum(tl.cdiv(num_rows, BT), GROUP)
    i_slot = tl.load(chunk_offsets + i_s) + i_first_chunk

    o_t = tl.arange(0, BT)
    o_k = i_kb * BK + tl.arange(0, BK)
    o_v = tl.arange(0, V)
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    low = k.dtype.element_ty
    p_states = states + (i_g.to(tl.int64) * H + i_h) * K * V
    b_S = tl.load(p_states + o_k[:, None] * V + o_v[None, :]).to(tl.float32)  # [BK, V]
    for i in range(0, num_chunks):
        i_t = num_chunks - 1 - i if REVERSE else i
        m_t = i_t * BT + o_t < num_rows
        rows = (i_first + i_t * BT).to(tl.int64) * H + i_h
        i_chunk = (i_slot + i_t).to(tl.int64) * H + i_h
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_e = tl.load(errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        b_y = tl.load(d_errors + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        b_do = tl.load(do + rows * V + o_tv, mask=m_t[:, None], other=0.0)  # [BT, V]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(gates + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(gates + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(gates + i_chunk * 2 * BT + BT - 1)
        b_S_low = b_S.to(low)
        b_S = chunk_decay * b_S
        if REVERSE:
            b_dk = (b_to_end * b_beta) * tl.dot(b_e, tl.trans(b_S_low), input_precision=PRECISION)
            b_term = tl.sum(b_k.to(tl.float32) * b_dk, 1)
            b_q_side = ((scale * b_from_start) * b_do.to(tl.float32)).to(low)
            b_S += tl.dot(tl.trans(b_q), b_q_side, input_precision=PRECISION)
            b_k_side = ((-b_from_start * b_beta) * b_y.to(tl.float32)).to(low)
            b_S += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
        else:
            b_dq = (scale * b_from_start) * tl.dot(b_do, tl.trans(b_S_low), input_precision=PRECISION)
            b_dk = (-b_from_start * b_beta) * tl.dot(b_y, tl.trans(b_S_low), input_precision=PRECISION)
            b_term = tl.sum(b_q.to(tl.float32) * b_dq + b_k.to(tl.float32) * b_dk, 1)
            b_k_side = ((b_to_end * b_beta) * b_e.to(tl.float32)).to(low)
            b_S += tl.dot(tl.trans(b_k), b_k_side, input_precision=PRECISION)
            tl.store(dq + rows * K + o_tk, b_dq.to(low), mask=m_t[:, None])
            b_dk += tl.load(dk + rows * K + o_tk, mask=m_t[:, None], other=0.0).to(tl.float32)
        tl.store(dk + rows * K + o_tk, b_dk.to(low), mask=m_t[:, None])
        i_part = i_chunk * (K // BK) + i_kb
        tl.store(row_terms + i_part * BT + o_t, b_term)
        tl.store(totals + i_part, tl.sum(b_term, 0))


def run_reverse_recurrence(q, k, beta, gates, solved, scores, do, cu_seqlens, table: ChunkTable, groups: ChunkTable,
                           scale, checkpoints, decayed_state, d_final_state, d_initial_state):  # fmt: skip
    """Walks every segment backwards, and fills d_initial_state where it is given.

    Returns y [R, H, V]; dS after every group [M, H, K, V]; parts of <S, dS> there [M, H, parts] float32.
    """
    (_, heads, key_size), value_size = k.shape, do.shape[2]
    launch, on_hopper = recurrence_launch(k, value_size, cu_seqlens.shape[0] - 1)
    d_errors, d_checkpoints = torch.empty_like(do), torch.empty_like(checkpoints)
    parts = value_size // launch.tile
    boundary = torch.empty(*checkpoints.shape[:2], parts, dtype=torch.float32, device=k.device)
    on_hopper_only = {}
    if on_hopper:
        on_hopper_only = {"STAGES": launch.num_stages}
        q, k, do = tiles(q, key_size), tiles(k, key_size), tiles(do, launch.tile)
        solved, scores = tiles(solved, CHUNK), tiles(scores, CHUNK)
    kernel = hopper_reverse_recurrence.reverse_recurrence_kernel if on_hopper else _reverse_recurrence_kernel
    kernel[((cu_seqlens.shape[0] - 1) * heads * (value_size // launch.tile),)](
        q=q,
        k=k,
        beta=beta,
        gates=gates,
        solved=solved,
        scores=scores,
        do=do,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        group_offsets=groups.offsets,
        checkpoints=checkpoints,
        decayed_state=decayed_state,
        d_final_state=d_final_state,
        d_initial_state=d_initial_state,
        d_checkpoints=d_checkpoints,
        d_errors=d_errors,
        boundary=boundary,
        scale=scale,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        GROUP=GROUP,
        HAS_D_FINAL_STATE=d_final_state is not None,
        STORE_D_INITIAL_STATE=d_initial_state is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **on_hopper_only,
    )
    return d_errors, d_checkpoints, boundary


class StateGradientSums(NamedTuple):
    """What g's gradient needs of the walks along the states: sums over parts of K, from the state before a chunk (0:
    q * dq + k * dk) and from the state after it (1: k * dk).

    Attributes:
        row_terms: [2, N, H, parts, BT] float32, a token's.
        totals: [2, N, H, parts] float32, a chunk's.
    """

    row_terms: torch.Tensor
    totals: torch.Tensor

    @classmethod
    def empty(cls, k: torch.Tensor, value_size: int, table: ChunkTable) -> StateGradientSums:
        parts = k.shape[2] // min(state_gradients_launch(k, value_size)[0].tile, k.shape[2])
        shape = 2, table.segment.shape[0], k.shape[1], parts
        like = {"dtype": torch.float32, "device": k.device}
        return cls(torch.empty(*shape, CHUNK, **like), torch.empty(shape, **like))


def run_state_gradients(q, k, beta, gates, errors, d_errors, do, states, cu_seqlens, table: ChunkTable,
                        groups: ChunkTable, scale, dq, dk, sums: StateGradientSums):  # fmt: skip
    """What the states owe to dq and dk [R, H, K], and to the gradient of g.

    Called twice: without dq, states are dS after every group, and dk is filled; with dq to fill, they are S before
    every group, and dk is added to.
    """
    (_, heads, key_size), value_size = k.shape, do.shape[2]
    launch, on_hopper = state_gradients_launch(k, value_size)
    kernel = hopper_states.state_gradients_kernel if on_hopper else _state_gradients_kernel
    reverse, parts = dq is None, sums.totals.shape[3]
    on_hopper_only = {}
    if on_hopper:
        q, k = tiles(q, key_size // parts), tiles(k, key_size // parts)
        errors, d_errors, do = (tiles(x, value_size) for x in (errors, d_errors, do))
        on_hopper_only = {
            "dq_tiles": None if reverse else tiles(dq, key_size // parts),
            "dk_tiles": None if reverse else tiles(dk, key_size // parts),
        }
    kernel[(groups.segment.shape[0] * heads * parts,)](
        q=q,
        k=k,
        beta=beta,
        gates=gates,
        errors=errors,
        d_errors=d_errors,
        do=do,
        states=states,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        group_segment=groups.segment,
        group_index=groups.index,
        dq=dq,
        dk=dk,
        row_terms=sums.row_terms[int(reverse)],
        totals=sums.totals[int(reverse)],
        scale=scale,
        num_segments=cu_seqlens.shape[0] - 1,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BK=key_size // parts,
        GROUP=GROUP,
        REVERSE=reverse,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        maxnreg=launch.registers,
        **on_hopper_only,
    )
