"""Forward kernels of the gated delta rule: what a chunk knows by itself, then the recurrence from chunk to chunk.

Shape legend: rows R, segments S, heads H, key size K, value size V, chunk length BT, chunk slots N.

With G the sum of g from the chunk's first row on and S the state at the chunk's start, a chunk of the recurrence is

    N = strictly_lower((k k^T) * exp(G_i - G_j))          P = lower((q k^T) * exp(G_i - G_j))
    X = (I + N diag(beta))^-1 N
    r = v - exp(G) * (k S)                                the error of what the decayed state predicts
    e = r - X (beta * r)                                  the error of what the state before each row predicts
    o = scale * (exp(G) * (q S) + P (beta * e))
    S <- exp(G_last) S + k^T (exp(G_last - G) * beta * e)

Storing X, and not the inverse, keeps the identity out of the inputs' type, and the transposed solve of the backward
pass uses it as it is. Every matrix product takes its left operand from memory as it was stored, never from registers:
ptxas of CUDA 12.8 and 12.9 miscompiles Hopper's asynchronous products with a left operand in registers (Triton pull
request 11781, and what is behind issues 640 and 984 of flash-linear-attention).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mom_layers.recur.chunk_table import CHUNK, GROUP, ChunkTable
from mom_layers.recur.scalar_delta.hopper import recurrence as hopper_recurrence
from mom_layers.recur.scalar_delta.hopper.tiles import tiles
from mom_layers.recur.scalar_delta.launch import SOLVE_WARPS, launch_for, recurrence_launch

# Rows of a diagonal block that is solved by substitution; products join the blocks.
BLOCK = 16
# Products of float32 inputs are exact in float32: no tf32. Other types ignore it. The triangular solve is float32 for
# every type; for the others its products take three tf32 parts, which lose no more than float32 does.
PRECISION = tl.constexpr("ieee")


@triton.jit
def decay_between(b_g):
    """[BT] log decays to exp(G_i - G_j) [BT, BT], zero above the diagonal.

    G is summed in float64 and kept as two float32 parts: after strong decay it is in the thousands, and rounding it to
    float32 would lose the small differences between rows that still see each other.
    """
    b_G = tl.cumsum(b_g.to(tl.float64), 0)
    b_high = b_G.to(tl.float32)
    b_low = (b_G - b_high.to(tl.float64)).to(tl.float32)
    b_between = (b_high[:, None] - b_high[None, :]) + (b_low[:, None] - b_low[None, :])
    # Masked before exp: above the diagonal the exponent is positive and could overflow.
    o_t = tl.arange(0, b_g.shape[0])
    return tl.exp(tl.where(o_t[:, None] >= o_t[None, :], b_between, float("-inf")))


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_scores_kernel(
    q,
    k,
    g,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    gates,
    mixing,
    scores,
    num_segments,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """exp(G), exp(G_last - G), N (float32) and P of one chunk and head."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_s = tl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    i_chunk = i_c.to(tl.int64) * H + i_h
    o_t = tl.arange(0, BT)
    m_t = i_row + o_t < tl.load(cu_seqlens + i_s + 1)
    rows = i_row.to(tl.int64) * H + i_h

    b_g = tl.load(g + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)  # [BT]
    b_G = tl.cumsum(b_g.to(tl.float64), 0)
    b_to_end = tl.sum(b_g.to(tl.float64), 0) - b_G
    tl.store(gates + i_chunk * 2 * BT + o_t, tl.exp(b_G.to(tl.float32)))
    tl.store(gates + i_chunk * 2 * BT + BT + o_t, tl.exp(b_to_end.to(tl.float32)))

    b_N = tl.zeros([BT, BT], tl.float32)
    b_P = tl.zeros([BT, BT], tl.float32)
    for i_k in range(0, K, BK):
        o_tk = o_t[:, None] * (H * K) + i_k + tl.arange(0, BK)[None, :]
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, BK]
        b_N += tl.dot(b_k, tl.trans(b_k), input_precision=PRECISION)
        b_P += tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)

    b_between = decay_between(b_g)
    b_N = tl.where(o_t[:, None] > o_t[None, :], b_N * b_between, 0.0)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    tl.store(mixing + i_chunk * BT * BT + o_tt, b_N)
    tl.store(scores + i_chunk * BT * BT + o_tt, (b_P * b_between).to(scores.dtype.element_ty))


@triton.jit
def _pick(b_blocks, i, BC: tl.constexpr):
    """Block i of [4, BC, BC]."""
    return tl.sum(tl.where(tl.arange(0, 4)[:, None, None] == i, b_blocks, 0.0), 0)


@triton.jit(do_not_specialize=["num_segments"])
def _chunk_solve_kernel(
    beta,
    cu_seqlens,
    chunk_segment,
    chunk_index,
    mixing,
    solved,
    num_segments,
    H: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X of one chunk and head, in float32: the four diagonal blocks by substitution, the six below by products."""
    i_c, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    i_s = tl.load(chunk_segment + i_c)
    if i_s >= num_segments:
        return
    i_row = tl.load(cu_seqlens + i_s) + tl.load(chunk_index + i_c) * BT
    last = tl.load(cu_seqlens + i_s + 1)
    i_chunk = i_c.to(tl.int64) * H + i_h
    p_beta = beta + i_row.to(tl.int64) * H + i_h
    p_N = mixing + i_chunk * BT * BT
    p_X = solved + i_chunk * BT * BT
    X_type = solved.dtype.element_ty

    o_b = tl.arange(0, 4)
    o_r = tl.arange(0, BC)
    o_t = o_b[:, None] * BC + o_r[None, :]
    p_diagonal = o_t[:, :, None] * BT + o_t[:, None, :]
    b_beta = tl.load(p_beta + o_t * H, mask=i_row + o_t < last, other=0.0).to(tl.float32)  # [4, BC]

    # Column after column: once row i of X is final, it leaves the rows below. (I + A) X = N with A = N diag(beta)
    b_X = tl.load(p_N + p_diagonal)  # [4, BC, BC]
    b_A = b_X * b_beta[:, None, :]
    for i in range(0, BC - 1):
        b_row = tl.sum(tl.where(o_r[None, :, None] == i, b_X, 0.0), 1)  # [4, BC]
        b_column = tl.sum(tl.where(o_r[None, None, :] == i, b_A, 0.0), 2)  # [4, BC]
        b_X = b_X - b_column[:, :, None] * b_row[:, None, :]
    tl.store(p_X + p_diagonal, b_X.to(X_type))

    # Below the diagonal X_ij = (I + A_ii)^-1 (N_ij - sum_{j <= m < i} A_im X_mj); the inverse is I - X_ii diag(beta).
    b_I = tl.where(o_r[None, :, None] == o_r[None, None, :], 1.0, 0.0) - b_X * b_beta[:, None, :]
    b_I1, b_I2, b_I3 = _pick(b_I, 1, BC), _pick(b_I, 2, BC), _pick(b_I, 3, BC)
    b_X00, b_X11, b_X22 = _pick(b_X, 0, BC), _pick(b_X, 1, BC), _pick(b_X, 2, BC)
    b_beta0 = tl.sum(tl.where(o_b[:, None] == 0, b_beta, 0.0), 0)[None, :]  # [1, BC]
    b_beta1 = tl.sum(tl.where(o_b[:, None] == 1, b_beta, 0.0), 0)[None, :]
    b_beta2 = tl.sum(tl.where(o_b[:, None] == 2, b_beta, 0.0), 0)[None, :]

    p_block = o_r[:, None] * BT + o_r[None, :]
    b_N10 = tl.load(p_N + 1 * BC * BT + 0 * BC + p_block)  # [BC, BC]
    b_N20 = tl.load(p_N + 2 * BC * BT + 0 * BC + p_block)  # [BC, BC]
    b_N21 = tl.load(p_N + 2 * BC * BT + 1 * BC + p_block)  # [BC, BC]
    b_N30 = tl.load(p_N + 3 * BC * BT + 0 * BC + p_block)  # [BC, BC]
    b_N31 = tl.load(p_N + 3 * BC * BT + 1 * BC + p_block)  # [BC, BC]
    b_N32 = tl.load(p_N + 3 * BC * BT + 2 * BC + p_block)  # [BC, BC]
    b_A20, b_A21 = b_N20 * b_beta0, b_N21 * b_beta1
    b_A30, b_A31, b_A32 = b_N30 * b_beta0, b_N31 * b_beta1, b_N32 * b_beta2

    b_X10 = tl.dot(b_I1, b_N10 - tl.dot(b_N10 * b_beta0, b_X00, input_precision=PRECISION), input_precision=PRECISION)
    b_right = b_N21 - tl.dot(b_A21, b_X11, input_precision=PRECISION)
    b_X21 = tl.dot(b_I2, b_right, input_precision=PRECISION)
    b_right = b_N32 - tl.dot(b_A32, b_X22, input_precision=PRECISION)
    b_X32 = tl.dot(b_I3, b_right, input_precision=PRECISION)
    b_right = b_N20 - tl.dot(b_A20, b_X00, input_precision=PRECISION)
    b_right -= tl.dot(b_A21, b_X10, input_precision=PRECISION)
    b_X20 = tl.dot(b_I2, b_right, input_precision=PRECISION)
    b_right = b_N31 - tl.dot(b_A31, b_X11, input_precision=PRECISION)
    b_right -= tl.dot(b_A32, b_X21, input_precision=PRECISION)
    b_X31 = tl.dot(b_I3, b_right, input_precision=PRECISION)
    b_right = b_N30 - tl.dot(b_A30, b_X00, input_precision=PRECISION)
    b_right -= tl.dot(b_A31, b_X10, input_precision=PRECISION)
    b_right -= tl.dot(b_A32, b_X20, input_precision=PRECISION)
    b_X30 = tl.dot(b_I3, b_right, input_precision=PRECISION)

    tl.store(p_X + 1 * BC * BT + 0 * BC + p_block, b_X10.to(X_type))
    tl.store(p_X + 2 * BC * BT + 0 * BC + p_block, b_X20.to(X_type))
    tl.store(p_X + 2 * BC * BT + 1 * BC + p_block, b_X21.to(X_type))
    tl.store(p_X + 3 * BC * BT + 0 * BC + p_block, b_X30.to(X_type))
    tl.store(p_X + 3 * BC * BT + 1 * BC + p_block, b_X31.to(X_type))
    tl.store(p_X + 3 * BC * BT + 2 * BC + p_block, b_X32.to(X_type))
    o_all = tl.arange(0, BT)
    above = o_all[:, None] // BC < o_all[None, :] // BC
    tl.store(p_X + o_all[:, None] * BT + o_all[None, :], tl.zeros([BT, BT], X_type), mask=above)


@triton.jit
def _recurrence_kernel(
    q,
    k,
    v,
    beta,
    gates,
    solved,
    scores,
    cu_seqlens,
    chunk_offsets,
    group_offsets,
    initial_state,
    o,
    final_state,
    decayed_state,
    checkpoints,
    errors,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    STORE_FINAL_STATE: tl.constexpr,
    FOR_BACKWARD: tl.constexpr,
):
    """BV columns of the state along one segment and head. For the backward pass also e, and every GROUP-th state."""
    # The last segments start first: in a Mixture-of-Memories they are the shared memory's, the longest ones.
    i_v = tl.program_id(0) % (V // BV)
    i_h = tl.program_id(0) // (V // BV) % H
    i_s = (tl.num_programs(0) - 1 - tl.program_id(0)) // (V // BV) // H
    i_first = tl.load(cu_seqlens + i_s)
    num_rows = tl.load(cu_seqlens + i_s + 1) - i_first
    i_chunk = tl.load(chunk_offsets + i_s).to(tl.int64) * H + i_h
    rows = i_first.to(tl.int64) * H + i_h

    o_t = tl.arange(0, BT)
    o_k = tl.arange(0, K)
    o_v = i_v * BV + tl.arange(0, BV)
    o_tt = o_t[:, None] * BT + o_t[None, :]
    o_tk = o_t[:, None] * (H * K) + o_k[None, :]
    o_tv = o_t[:, None] * (H * V) + o_v[None, :]
    o_kv = o_k[:, None] * V + o_v[None, :]
    i_state = (i_s.to(tl.int64) * H + i_h) * K * V
    low = k.dtype.element_ty

    if HAS_INITIAL_STATE:
        b_S = tl.load(initial_state + i_state + o_kv).to(tl.float32)  # [K, BV]
    else:
        b_S = tl.zeros([K, BV], tl.float32)
    for i_t in range(0, tl.cdiv(num_rows, BT)):
        m_t = i_t * BT + o_t < num_rows
        b_k = tl.load(k + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_v = tl.load(v + rows * V + o_tv, mask=m_t[:, None], other=0.0).to(tl.float32)  # [BT, BV]
        b_beta = tl.load(beta + rows + o_t * H, mask=m_t, other=0.0).to(tl.float32)[:, None]  # [BT, 1]
        b_from_start = tl.load(gates + i_chunk * 2 * BT + o_t)[:, None]  # [BT, 1]
        b_to_end = tl.load(gates + i_chunk * 2 * BT + BT + o_t)[:, None]  # [BT, 1]
        chunk_decay = tl.load(gates + i_chunk * 2 * BT + BT - 1)
        b_X = tl.load(solved + i_chunk * BT * BT + o_tt)  # [BT, BT]

        b_S_low = b_S.to(low)
        b_r = b_v - b_from_start * tl.dot(b_k, b_S_low, input_precision=PRECISION)
        b_e = b_r - tl.dot(b_X, (b_beta * b_r).to(low), input_precision=PRECISION)
        b_u = b_beta * b_e
        if FOR_BACKWARD:
            tl.store(errors + rows * V + o_tv, b_e.to(low), mask=m_t[:, None])
            if i_t % GROUP == 0:
                i_group = (tl.load(group_offsets + i_s) + i_t // GROUP).to(tl.int64) * H + i_h
                tl.store(checkpoints + i_group * K * V + o_kv, b_S_low)
        b_q = tl.load(q + rows * K + o_tk, mask=m_t[:, None], other=0.0)  # [BT, K]
        b_P = tl.load(scores + i_chunk * BT * BT + o_tt)  # [BT, BT]
        b_o = b_from_start * tl.dot(b_q, b_S_low, input_precision=PRECISION)
        b_o += tl.dot(b_P, b_u.to(low), input_precision=PRECISION)
        tl.store(o + rows * V + o_tv, (scale * b_o).to(low), mask=m_t[:, None])
        b_S = chunk_decay * b_S
        if FOR_BACKWARD and STORE_FINAL_STATE:
            if (i_t + 1) * BT >= num_rows:
                tl.store(decayed_state + i_state + o_kv, b_S.to(low))
        b_S += tl.dot(tl.trans(b_k), (b_to_end * b_u).to(low), input_precision=PRECISION)
        rows += BT * H
        i_chunk += H
    if STORE_FINAL_STATE:
        tl.store(final_state + i_state + o_kv, b_S)


def chunk_local(q, k, g, beta, cu_seqlens, table: ChunkTable):
    """What a chunk knows without the state.

    Returns exp(G) and exp(G_last - G) as one tensor [N, H, 2, BT] float32, and X and P [N, H, BT, BT] in q's type.
    """
    slots, heads, key_size = table.segment.shape[0], q.shape[1], q.shape[2]
    num_segments = cu_seqlens.shape[0] - 1
    gates = torch.empty(slots, heads, 2, CHUNK, dtype=torch.float32, device=q.device)
    mixing = torch.empty(slots, heads, CHUNK, CHUNK, dtype=torch.float32, device=q.device)
    scores = torch.empty(slots, heads, CHUNK, CHUNK, dtype=q.dtype, device=q.device)
    solved = torch.empty_like(scores)
    launch = launch_for("chunk_scores", q)
    _chunk_scores_kernel[(slots * heads,)](
        q=q,
        k=k,
        g=g,
        cu_seqlens=cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        gates=gates,
        mixing=mixing,
        scores=scores,
        num_segments=num_segments,
        H=heads,
        K=key_size,
        BT=CHUNK,
        BK=min(launch.tile, key_size),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    _chunk_solve_kernel[(slots * heads,)](
        beta=beta,
        cu_seqlens=cu_seqlens,
        chunk_segment=table.segment,
        chunk_index=table.index,
        mixing=mixing,
        solved=solved,
        num_segments=num_segments,
        H=heads,
        BT=CHUNK,
        BC=BLOCK,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32x3",
        num_warps=SOLVE_WARPS,
    )
    return gates, solved, scores


def run_recurrence(q, k, v, beta, gates, solved, scores, cu_seqlens, table: ChunkTable, groups: ChunkTable, scale,
                   initial_state, o, final_state=None, decayed_state=None, checkpoints=None, errors=None):  # fmt: skip
    """Walks every segment and fills o, and whichever of the others are given.

    final_state: [S, H, K, V] float32. decayed_state: as much of it as was there before the last chunk; unset for empty
    segments. checkpoints: [groups' slots, H, K, V], the state before every group of chunks.
    errors: [R, H, V], e.
    """
    (_, heads, key_size), value_size = k.shape, v.shape[2]
    launch, on_hopper = recurrence_launch(k, value_size, cu_seqlens.shape[0] - 1)
    on_hopper_only = {}
    if on_hopper:
        q, k, v = tiles(q, key_size), tiles(k, key_size), tiles(v, launch.tile)
        solved, scores = tiles(solved, CHUNK), tiles(scores, CHUNK)
        on_hopper_only = {
            "STAGES": launch.num_stages,
            "o_tiles": tiles(o, launch.tile),
            "error_tiles": None if errors is None else tiles(errors, launch.tile),
        }
    kernel = hopper_recurrence.recurrence_kernel if on_hopper else _recurrence_kernel
    kernel[((cu_seqlens.shape[0] - 1) * heads * (value_size // launch.tile),)](
        q=q,
        k=k,
        v=v,
        beta=beta,
        gates=gates,
        solved=solved,
        scores=scores,
        cu_seqlens=cu_seqlens,
        chunk_offsets=table.offsets,
        group_offsets=groups.offsets,
        initial_state=initial_state,
        o=o,
        final_state=final_state,
        decayed_state=decayed_state,
        checkpoints=checkpoints,
        errors=errors,
        scale=scale,
        H=heads,
        K=key_size,
        V=value_size,
        BT=CHUNK,
        BV=launch.tile,
        GROUP=GROUP,
        HAS_INITIAL_STATE=initial_state is not None,
        STORE_FINAL_STATE=final_state is not None,
        FOR_BACKWARD=checkpoints is not None,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **on_hopper_only,
    )
