"""exp, sigmoid and tanh in the fewest instructions, for kernels that the number of instructions holds back.

`tl.exp` and `tl.sigmoid` take five and twelve; most of them treat results below 1e-38, which here are zero, and a
division's very large divisors.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # the interpreter knows no assembly


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), the reciprocal as a square: a reciprocal root is one instruction, a division is not."""
    root = tl.rsqrt(1.0 + exp(-x))
    return root * root


@triton.jit
def tanh(x, dtype: tl.constexpr):
    """tanh for values that are stored as dtype: for bfloat16 the GPU's own, one instruction with a relative error of
    2^-11; an absolute error of 1e-7 for wider types. SiLU as h + h tanh(h) then errs by up to 2^-11 h, absolutely."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return 2.0 * sigmoid(2.0 * x) - 1.0
