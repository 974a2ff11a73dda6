"""The kernel family of gated linear attention (GLA): one log decay for each row, head and key channel, no delta rule.

`operation` has the public function and checks the inputs. `torch` is the chunked PyTorch path. `autograd` calls the
host functions of a kernel set: `triton` on any chip. `kernel_sets` lists the sets, `tensors` has what the host
functions hand to each other.

The equations are numbered through the family: (1) to (5) in `triton.chunk_local`, (6) and (7) in `triton.recurrence`,
(8) and (9) in `triton.reverse_recurrence`, (10) to (14) in `triton.state_gradients`, (15) to (19) in
`triton.local_gradients`, (20) in `triton.blocks`, (21) in `triton.block_scores`, (22) and (23) in
`triton.block_gradients`.
"""

from mom_layers.recur.channel_decay.operation import gated_linear_attention

__all__ = ["gated_linear_attention"]
