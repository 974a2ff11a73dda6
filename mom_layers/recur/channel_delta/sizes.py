"""Head sizes at which the kernels were found right on a GPU: none yet."""

from __future__ import annotations


def gpu_fault(k_dim: int, v_dim: int) -> str:
    """What tests on an H200 found at a key size and a value size with Triton 3.6.

    For 16-bit inputs, and sequences of several lengths, the tests ended in an illegal memory access or in wrong
    results, although the kernels are right in Triton's interpreter. Heads of 256 with sequences of one length were
    right, beside flash-linear-attention's operation. No other case with heads of 256 was reached.
    """
    return "an illegal memory access or wrong results for sequences of several lengths on an H200"
