"""How the decay between two rows of a chunk becomes a matrix product, for every key channel at once.

The rows j < i of a chunk meet with a decay exp(g(j, i]) of their own in every channel. With c_i the sum of g from a
border up to row i, negative before the border, the decay is a product of two numbers, each of one row:

    exp(g(j, i]) = exp(c_i) exp(-c_j)

where both are exponentials of sums of either sign. So a level takes blocks of 2 h rows, each with its border in the
middle, in one of two ways:

    whole     where no |c| exceeds LIMIT, all rows of a block meet. No factor overflows: exp(60) is far below 1e38, also
              in bfloat16, in which these products run for 16-bit inputs. The level is the last one.
    halves    where some |c| exceeds LIMIT, the later half of a block meets the earlier half: both factors are at most 1
              for any decay. The pairs inside a half are left to the next level, whose blocks are the halves.

The first level has a block of all 64 rows. Few channels decay by e^-60 in 32 rows, so that one level is the usual
case. After six levels, h = 1, all pairs have met. A level below the first takes its c as sums of its own rows, never as
a difference of two longer sums: a small sum beside a strong decay keeps its digits.

A kernel without any other level needs fewer registers. So every kernel that takes levels runs twice: for the chunks
that are whole on the first level, and then for the others, whose programs alone do not return at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mom_layers.common.activations_triton import exp

# Level l has blocks of 2^l rows; the first has the chunk's 64.
FIRST_LEVEL = tl.constexpr(6)
# 16-bit inputs; float32 inputs, whose first level's differences of sums keep digits to 1e-6 under the lower limit.
LIMIT = tl.constexpr(60.0)
EXACT_LIMIT = tl.constexpr(10.0)
# Products of float32 inputs are exact in float32: no tf32. Other types ignore this setting.
PRECISION = tl.constexpr("ieee")


@triton.jit
def sums_after(g, o_tk, o_t, m_k, num_rows, STRIDE: tl.constexpr):
    """The sums of g over the rows after each row, as sums of those rows, float32 [BT, BK].

    g: pointer to the chunk's first row, whose rows are STRIDE apart; ``num_rows`` of the rows exist. m_k [BK]: which
    channels exist.
    """
    m_next = (o_t + 1 < o_t.shape[0]) & (o_t + 1 < num_rows)
    b_next = tl.load(g + STRIDE + o_tk, mask=m_next[:, None] & m_k[None, :], other=0.0).to(tl.float32)
    return tl.cumsum(b_next, 0, reverse=True)


@triton.jit
def border_sums(b_g, level):
    """c [BT, BK] of a level, float32: a row of a later half sums from the border up to itself, a row of an earlier half
    from the next row up to the border. Sums of 1, 2, 4, ... rows are put together by doubling."""
    BT: tl.constexpr = b_g.shape[0]
    o_t = tl.broadcast_to(tl.arange(0, BT)[:, None], [BT, b_g.shape[1]])
    half = 1 << (level - 1)
    place = o_t & (half - 1)
    late = is_late(o_t, level)
    b_sum = tl.gather(b_g, tl.where(late, o_t, tl.minimum(o_t + 1, BT - 1)), 0)
    b_sum = tl.where(late | (place + 1 < half), b_sum, 0.0)
    length = half * 0 + 1
    while length < half:
        inside = (late & (place >= length)) | ((late == 0) & (place + length < half))
        other = tl.where(inside, tl.where(late, o_t - length, o_t + length), o_t)
        b_sum += tl.where(inside, tl.gather(b_sum, other, 0), 0.0)
        length = 2 * length
    return tl.where(late, b_sum, -b_sum)


@triton.jit
def first_sums(b_g, b_G):
    """c [BT, BK] of the first level, from g and its sums from the chunk's start, and whether no |c| exceeds a limit.

    A difference of two sums: to be read where the level is whole, and where sums of less than twice the limit keep
    their digits.
    """
    BT: tl.constexpr = b_g.shape[0]
    b_middle = tl.sum(tl.where((tl.arange(0, BT) < BT // 2)[:, None], b_g, 0.0), 0)
    return b_G - b_middle[None, :]


@triton.jit
def largest(b_x):
    """The largest number of [BT, BK], none of which is negative."""
    return tl.max(tl.max(b_x, 1), 0)


@triton.jit
def is_late(o_t, level):
    """Whether a row stands in the later half of its block."""
    return ((o_t >> (level - 1)) & 1) != 0


@triton.jit
def level_factors(b_c, o_t, level, whole):
    """exp(c) of the rows that meet earlier rows, and exp(-c) of the rows that meet later rows; 0 of other rows."""
    late = is_late(o_t, level)[:, None]
    barred = tl.where(whole, 0.0, float("-inf"))
    b_from = exp(tl.where(late, b_c, b_c + barred))
    b_to = exp(tl.where(late, barred - b_c, -b_c))
    return b_from, b_to


@triton.jit
def level_pairs(o_t, level):
    """[BT, BT], whether row i meets the earlier row j on this level, and the same transposed."""
    same_block = (o_t[:, None] >> level) == (o_t[None, :] >> level)
    return same_block & (o_t[:, None] > o_t[None, :]), same_block & (o_t[:, None] < o_t[None, :])


@triton.jit
def level_is_whole(level, g_max, EXACT: tl.constexpr):
    """Whether |c| cannot exceed the limit on a level below the first, where no |g| exceeds g_max."""
    rows = (1 << (level - 1)).to(tl.float32)
    return rows * g_max <= (EXACT_LIMIT if EXACT else LIMIT)
