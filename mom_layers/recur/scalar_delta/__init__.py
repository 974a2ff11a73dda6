"""The gated delta rule over packed segments: plain PyTorch in `chunked`, Triton kernels in the rest.

`autograd` checks the inputs and holds the gradients; `forward`, `local` and `backward` are the kernels, `launch` their
tiles and warps, and the `hopper` modules what replaces some of them on that chip.
"""

from mom_layers.recur.scalar_delta.operation import gated_delta_rule

__all__ = ["gated_delta_rule"]
