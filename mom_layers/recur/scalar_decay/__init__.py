"""The kernel family of linear attention with one log decay for each row and head, or a fixed one, or none.

`operation` has the public functions and checks the inputs. `torch` is the chunked PyTorch path. `autograd` calls the
host functions of a kernel set: `triton` on any chip, `blackwell` with other tiles. `kernel_sets` lists the sets,
`tensors` has what the host functions hand to each other.

The equations are numbered through the family: (1) in `triton.decays`, (2) to (5) in `triton.walk`, (6) and (7) in
`triton.decay_gradient`.
"""

from mom_layers.recur.scalar_decay.operation import scalar_decay

__all__ = ["scalar_decay"]
