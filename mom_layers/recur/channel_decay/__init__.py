"""Gated linear attention over packed segments: plain PyTorch in `chunked`, Triton kernels in the rest.

`autograd` checks the inputs and holds the gradients; `forward`, `local` and `backward` are the kernels, `launch` their
tiles and warps.
"""

from mom_layers.recur.channel_decay.operation import gated_linear_attention

__all__ = ["gated_linear_attention"]
