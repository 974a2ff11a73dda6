"""exp, sigmoid and tanh in few instructions, for kernels whose speed is limited by the number of their instructions;
and an exact softplus.

`tl.exp` takes five instructions and `tl.sigmoid` twelve. Most of these treat results below 1e-38, which are zero here,
and the very large divisors of a division.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter runs no assembly


@triton.jit
def exp(x):
    """exp(x) = 2^(x log2(e)): two instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)): six instructions."""
    # A reciprocal square root is one instruction, a division is many.
    root = tl.rsqrt(1.0 + exp(-x))
    return root * root


@triton.jit
def tanh(x, dtype: tl.constexpr):
    """tanh(x) to the precision of ``dtype``, the type in which the caller stores its results.

    For bfloat16 NVIDIA's own instruction, with a relative error of 2^-11: SiLU(2 h) = h + h tanh(h) then has an
    absolute error of up to 2^-11 h. Elsewhere the absolute error is 1e-7.
    """
    if dtype == tl.bfloat16 and not INTERPRETED and tl.target_info.is_cuda():
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 2.0 * sigmoid(2.0 * x) - 1.0


@triton.jit
def softplus(x):
    """log(1 + e) with e = exp(x), exact to the last bits where e is small.

    ``log(u) e / (u - 1)`` with u = 1 + e as rounded: the quotient cancels the rounding of u. Above 20 the result is x.
    """
    b_e = tl.exp(tl.minimum(x, 20.0))
    b_u = 1.0 + b_e
    b_log = tl.where(b_u == 1.0, b_e, tl.log(b_u) * (b_e / tl.where(b_u == 1.0, 1.0, b_u - 1.0)))
    return tl.where(x > 20.0, x, b_log)
