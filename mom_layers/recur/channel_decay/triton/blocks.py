"""Gated linear attention inside a block of 16 rows: sums of g, and pairs of rows, by small matrix products.

Shape legend: block length BC, key size K, columns of a program BK.

A pair of rows j < i decays by exp(g(j, i]), another number for every pair and channel. One matrix product computes
every pair of a level: blocks of 2 HALF rows, whose later half (late rows) reads the earlier half (early rows). Both
decay to the border between them, over

    (20)  a_r = g(border, r] of a late row r,  g(r, border] of an early row r

and with x = exp(a) q of late rows and exp(a) k of early rows, the pair's share of the scores is x_i . x_j. Every pair
of a block meets at exactly one of the levels HALF = 8, 4, 2, 1. No exponent is positive, however strong the decay is,
and no sum of g is a difference of two longer sums.

The sums of g are matrix products too, with a matrix of zeros and ones: a product in bfloat16 takes g in two parts, of
8 bits each, and adds them up in float32. A program of one warp then moves nothing between threads to sum over rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mom_layers.common.activations_triton import LOG2_E

# Rows of a block: the least side of a tensor core's product.
BLOCK = 16
# Products of float32 inputs are exact in float32: no tf32. Other types ignore it.
PRECISION = tl.constexpr("ieee")


@triton.jit
def first_bits(b_x):
    """float32 cut off to the bits of bfloat16: one instruction, where a conversion there and back is slower."""
    return (b_x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def sums_of_rows(b_which, b_x, EXACT: tl.constexpr):
    """Sums of rows of b_x [BC, BK] float32; row i of b_which [BC, BC] says which rows the sum i has. [BC, BK] float32.

    EXACT: by products of float32, which few chips have tensor cores for.
    """
    if EXACT:
        return tl.dot(b_which.to(tl.float32), b_x, input_precision=PRECISION)
    else:
        b_one = b_which.to(tl.float32).to(tl.bfloat16)
        b_high = first_bits(b_x)
        b_sum = tl.dot(b_one, (b_x - b_high).to(tl.bfloat16))
        return tl.dot(b_one, b_high.to(tl.bfloat16), b_sum)


@triton.jit
def sums_of_columns(b_which, b_x, EXACT: tl.constexpr):
    """As :func:`sums_of_rows`, of columns of b_x [BK, BC], which are the block's rows. [BK, BC] float32.

    A warp keeps b_x in the registers where the last product left it: the result of one product is the left operand of
    the next.
    """
    if EXACT:
        return tl.dot(b_x, tl.trans(b_which.to(tl.float32)), input_precision=PRECISION)
    else:
        b_one = tl.trans(b_which.to(tl.float32).to(tl.bfloat16))
        b_high = first_bits(b_x)
        b_sum = tl.dot((b_x - b_high).to(tl.bfloat16), b_one)
        return tl.dot(b_high.to(tl.bfloat16), b_one, b_sum)


@triton.jit
def add_sums_of_columns(b_sum, b_which, b_x, EXACT: tl.constexpr):
    """b_sum + the sums of columns of b_x, which is rounded to bfloat16: for sums whose terms are rounded anyway."""
    if EXACT:
        return tl.dot(b_x, tl.trans(b_which.to(tl.float32)), b_sum, input_precision=PRECISION)
    else:
        return tl.dot(b_x.to(tl.bfloat16), tl.trans(b_which.to(tl.float32).to(tl.bfloat16)), b_sum)


@triton.jit
def rows_until(BC: tl.constexpr):
    """For each row, the rows up to that row, that row included. [BC, BC]."""
    o_r = tl.arange(0, BC)
    return o_r[None, :] <= o_r[:, None]


@triton.jit
def rows_after(BC: tl.constexpr):
    """For each row, the rows after that row. [BC, BC]."""
    o_r = tl.arange(0, BC)
    return o_r[None, :] > o_r[:, None]


@triton.jit
def late_rows(BC: tl.constexpr, HALF: tl.constexpr):
    """Which rows are late at a level. [BC]."""
    return tl.arange(0, BC) // HALF % 2 == 1


@triton.jit
def rows_to_border(BC: tl.constexpr, HALF: tl.constexpr):
    """For each row, the rows of the sum (20) at a level. [BC, BC]."""
    o_r = tl.arange(0, BC)
    b_late = late_rows(BC, HALF)[:, None]
    return (o_r[:, None] // HALF == o_r[None, :] // HALF) & (b_late == rows_until(BC))


@triton.jit
def meet(BC: tl.constexpr, HALF: tl.constexpr):
    """Which rows meet at a level: a late one and an early one, in either order. [BC, BC]."""
    o_r = tl.arange(0, BC)
    b_late = late_rows(BC, HALF)
    return (o_r[:, None] // (2 * HALF) == o_r[None, :] // (2 * HALF)) & (b_late[:, None] != b_late[None, :])


@triton.jit
def exponents(b_g):
    """g as an exponent of two, float32. At least -160, where float32 has no number but zero: a sum keeps the digits of
    its other terms."""
    return tl.maximum(b_g.to(tl.float32) * LOG2_E, -160.0)
