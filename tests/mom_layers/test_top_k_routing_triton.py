"""The router's choice in Triton against PyTorch's, outputs and gradients."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, draw, relative_error

from mom_layers.route.router import route

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def triton_route(logits, topk):
    return route(logits, topk, kernels="triton")


def expected(logits, topk):
    return route(logits.double(), topk, kernels="torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "memories", "topk"),
    [(1, 2, 1), (7, 2, 2), (300, 4, 2), (257, 3, 3), (40, 8, 1), (33, 33, 5), (17, 64, 64), (0, 4, 2)],
)
def test_outputs_and_gradients(tokens, memories, topk, dtype):
    distinct = torch.stack([torch.randperm(memories) for _ in range(tokens)]) if tokens else torch.zeros(0, memories)
    logits = (distinct.to(DEVICE) * 0.125 - 1).to(dtype).requires_grad_()  # exact in 16 bits: no ties
    weights, ids = triton_route(logits, topk)
    reference_logits = logits.detach().double().requires_grad_()
    reference_weights, reference_ids = expected(reference_logits, topk)
    assert weights.dtype == torch.float32 and torch.equal(ids, reference_ids)
    assert relative_error(weights, reference_weights) <= 1e-6
    dweights = draw(tokens, topk)
    weights.backward(dweights)
    reference_weights.backward(dweights.double())
    assert logits.grad.dtype == dtype
    if topk == 1:  # its weight is 1 whatever the logit
        assert not logits.grad.abs().gt(1e-6).any()
    else:
        bound = 2e-3 if dtype == torch.float16 else TOLERANCE[dtype]
        assert relative_error(logits.grad, reference_logits.grad) <= bound


def test_a_column_slice_of_a_wider_tensor():
    wide = draw(50, 9)
    weights, ids = triton_route(wide[:, 2:7], 2)
    reference_weights, reference_ids = expected(wide[:, 2:7], 2)
    assert torch.equal(ids, reference_ids) and relative_error(weights, reference_weights) <= 1e-6


def test_equal_logits_go_to_the_lower_memories():
    weights, ids = triton_route(torch.zeros(5, 6, device=DEVICE), 3)
    assert ids.tolist() == [[0, 1, 2]] * 5
    assert torch.allclose(weights, torch.full_like(weights, 1 / 3))


def test_infinite_and_undefined_logits():
    """The choices stay different memories, so that the plan is one; the weights say that something is wrong."""
    infinite, undefined = float("-inf"), float("nan")
    rows = [
        [infinite, 1.0, infinite, infinite],
        [undefined, 1.0, 2.0, 3.0],
        [undefined] * 4,
        [infinite] * 4,
        [0.0, 1.0, 2.0, 3.0],
    ]
    weights, ids = triton_route(torch.tensor(rows, device=DEVICE), 2)
    assert all(len(set(pair)) == 2 and set(pair) <= {0, 1, 2, 3} for pair in ids.tolist())
    assert ids[0, 0] == 1 and weights[0].tolist() == [1.0, 0.0]
    assert weights[1:4].isnan().all()
    assert ids[4].tolist() == [3, 2] and weights[4].isfinite().all()


@pytest.mark.parametrize(
    ("logits", "topk", "message"),
    [
        (torch.zeros(3, 4, dtype=torch.int32), 2, "logits must be a tensor of floating-point numbers, got torch.int32"),
        (torch.zeros(3), 1, r"\[N, M\], got \[3\]"),
        (torch.zeros(4, 3).t(), 2, "strides"),
        (torch.zeros(3, 4), 5, r"memories \(4\), got 5"),
        (torch.zeros(3, 4), 0, r"memories \(4\), got 0"),
        (torch.zeros(2, 1025), 2, "at most 1024 columns for kernels='triton', got 1025"),
    ],
)
def test_bad_input_is_refused(logits, topk, message):
    with pytest.raises(ValueError, match=message):
        triton_route(logits.to(DEVICE), topk)


def test_float64_logits_are_computed_in_pytorch():
    logits = draw(20, 4).double()
    weights, ids = triton_route(logits, 2)
    assert weights.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip((weights, ids), expected(logits, 2), strict=True))
