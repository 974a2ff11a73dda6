"""The kernel family of Kimi Delta Attention (KDA) and Gated DeltaNet-2: one log decay for each row, head and key
channel, and a delta rule: a row's transition is a diagonal matrix plus a matrix of rank one.

`operation` has the public functions and checks the inputs. `torch` is the chunked PyTorch path. `autograd` calls the
host functions of a kernel set: `triton` on any chip. `kernel_sets` lists the sets, `tensors` has what the host
functions hand to each other. `gates_triton` computes the rules' log decay.

The equations are numbered through the family: (1) to (6) in `triton.chunk_local`, (7) to (10) in `triton.recurrence`,
(11) to (13) in `triton.reverse_recurrence`, (14) to (17) in `triton.score_gradients`, (18) to (24) in
`triton.row_gradients`.
"""

from mom_layers.recur.channel_delta.operation import (
    channel_delta_rule,
    gated_delta_rule_2,
    initial_state_gradient,
    kimi_delta_attention,
)

__all__ = ["channel_delta_rule", "gated_delta_rule_2", "initial_state_gradient", "kimi_delta_attention"]
