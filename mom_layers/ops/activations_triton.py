"""exp and sigmoid in the fewest instructions, for kernels that the number of instructions holds back.

`tl.exp` and `tl.sigmoid` take five and twelve; most of them treat results below 1e-38, which here are zero, and a
division's very large divisors.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), the reciprocal as a square: a reciprocal root is one instruction, a division is not."""
    root = tl.rsqrt(1.0 + exp(-x))
    return root * root
