"""Tokens to rows and back: PyTorch and Triton against plain indexing, and which of the two runs."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, draw, inputs, layer, make_plan, relative_error

from mom_layers.route.rows import gather_rows, rows_of_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topk, shared, masked", [(2, True, False), (1, False, False), (3, True, True)])
def test_rows_and_the_gradient_of_their_tokens(topk, shared, masked, dtype, kernels):
    plan = make_plan([5, 0, 30], topk=topk, shared=shared, masked=masked)
    x = draw(35, 130, dtype=dtype).requires_grad_()
    rows = gather_rows(x, plan, kernels=kernels)
    token = plan.token_of_row.long()
    assert torch.equal(rows, x[token])
    drows = draw(*rows.shape, dtype=dtype, seed=2)
    (dx,) = torch.autograd.grad(rows, x, drows)
    expected = torch.zeros(35, 130, dtype=torch.float64, device=DEVICE).index_add_(0, token, drows.double())
    assert dx.dtype == dtype and relative_error(dx, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_rows_of_tokens_is_the_inverse_where_every_token_has_one_row(kernels):
    plan = make_plan([5, 0, 30], topk=1, shared=False)
    x = draw(35, 20).requires_grad_()
    back = rows_of_tokens(gather_rows(x, plan, kernels=kernels), plan, kernels=kernels)
    dback = draw(35, 20, seed=2)
    (dx,) = torch.autograd.grad(back, x, dback)
    assert torch.equal(back, x) and torch.equal(dx, dback)


def gradient_through_rows(kernels):
    plan = make_plan([3, 4])
    x = draw(7, 16).requires_grad_()
    return torch.autograd.grad(gather_rows(x, plan, kernels=kernels).sum(), x)[0]


def test_torch_launches_no_kernel(refused_launches):
    assert (gradient_through_rows("torch") == 3).all()


def test_triton_launches_a_kernel(refused_launches):
    with pytest.raises(RuntimeError, match="_sum_rows_kernel was launched"):
        gradient_through_rows("triton")


def test_auto_is_chosen_by_the_device(refused_launches):
    if DEVICE == "cuda":
        with pytest.raises(RuntimeError, match="was launched"):
            gradient_through_rows("auto")
    else:
        assert (gradient_through_rows("auto") == 3).all()


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="kernels must be one of 'auto', 'torch', 'triton', got 'numpy'"):
        gather_rows(draw(7, 16), make_plan([3, 4]), kernels="numpy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("single_kv_proj", [True, False])
@pytest.mark.parametrize("rule", ["gated_deltanet", "gla"])
def test_a_whole_layer_in_torch_launches_no_kernel(rule, single_kv_proj, dtype, refused_launches):
    mixer = layer(dtype, kernels="torch", rule=rule, single_kv_proj=single_kv_proj)
    x = inputs(2, 9, dtype=dtype)
    y, state = mixer(x, output_state=True)
    y.sum().backward()
    assert x.grad.isfinite().all() and all(p.grad.isfinite().all() for p in mixer.parameters())
    assert mixer.step(x[:, 0].detach(), state).isfinite().all()
