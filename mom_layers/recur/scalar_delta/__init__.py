"""The kernel family of the gated delta rule (Gated DeltaNet): one log decay and one write strength a row and head.

`operation` has the public functions and checks the inputs. `torch` is the chunked PyTorch path. `autograd` calls the
host functions of a kernel set: `triton` on any chip, `hopper` on H100 and H200. `kernel_sets` lists the sets, `tensors`
has what the host functions hand to each other. `gates_triton` computes the rule's gates.

The kernels' equations have one numbering: (1) to (4) in `triton.chunk_local`, (5) to (8) in `triton.recurrence`, (9) to
(11) in `triton.reverse_recurrence`, (12) to (15) in `triton.state_gradients`, (16) to (22) in `triton.local_gradients`.
"""

from mom_layers.recur.scalar_delta.operation import gated_delta_rule

__all__ = ["gated_delta_rule"]
