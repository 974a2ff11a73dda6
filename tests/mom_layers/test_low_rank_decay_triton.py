"""The log decay of the rules kda and gated_deltanet2 in Triton against PyTorch in float64."""

import pytest
import torch
from comparison import DEVICE, relative_error

from mom_layers.recur.channel_delta.gates_triton import low_rank_decay_triton
from mom_layers.recur.rules import kda

pytestmark = pytest.mark.usefixtures("poisoned_memory")
NAMES = ("A_log", "dt_bias", "decay_up")


def draw(rows, heads, key_size, dtype):
    torch.manual_seed(rows)
    parameters = {name: x.to(DEVICE) for name, x in kda.init_parameters(heads, key_size).items()}
    raw = 3 * torch.randn(rows, heads * kda.RANK + 5)
    return raw.to(DEVICE, dtype), parameters, torch.randn(rows, heads, key_size).to(DEVICE)


def decay_and_gradients(raw, parameters, dg, kernels):
    """g, and the gradients of the raw gate and the parameters. The raw gate is a part of wider columns."""
    leaves = {"raw": raw, **parameters}
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    part = leaves["raw"][:, 2:-3]
    g = kda.log_decay(part, {name: leaves[name] for name in NAMES}, kernels)
    return g, *torch.autograd.grad(g, list(leaves.values()), dg.to(g.dtype))


@pytest.mark.parametrize("rows,heads,key_size", [(0, 2, 16), (1, 1, 16), (130, 3, 64)])
@pytest.mark.parametrize("dtype,bound", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_decay_and_gradients_agree(rows, heads, key_size, dtype, bound):
    raw, parameters, dg = draw(rows, heads, key_size, dtype)
    got = decay_and_gradients(raw, parameters, dg, "triton")
    double = {name: x.double().cpu() for name, x in parameters.items()}
    want = decay_and_gradients(raw.double().cpu(), double, dg.double().cpu(), "torch")
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    assert all(relative_error(mine, theirs) <= bound for mine, theirs in zip(got, want, strict=True))
    assert relative_error(got[0], want[0]) <= 1e-5


def test_shapes_that_do_not_fit_are_named():
    raw, parameters, _ = draw(4, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=r"for up \[2, 16, 16\] raw must be \[R, 32\], .* got \[4, 37\]"):
        low_rank_decay_triton(raw, *(parameters[name] for name in NAMES))
