"""The combination in Triton against plain loops in float64: the output and every gradient."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, draw, make_plan, relative_error

from mom_layers.combine.operation import combine
from mom_layers.combine.reference import combine_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def triton_combine(gate, **given):
    return combine(output_gate=gate, kernels="triton", **given)


def inputs(plan, heads, size, topk, dtype=torch.float32, norm_dtype=torch.float32, gate_columns=0):
    tokens = plan.row_of_choice.shape[0]
    gate = draw(tokens, gate_columns + heads * size, dtype=dtype, seed=3)[:, gate_columns:].unflatten(1, (heads, size))
    return dict(
        o=draw(plan.num_rows, heads, size, dtype=dtype),
        weights=draw(tokens, topk, seed=2).softmax(-1),
        row_of_choice=plan.row_of_choice,
        gate=gate,
        norm_weight=draw(size, dtype=norm_dtype, seed=4),
        eps=1e-5,
    )


def compare(given):
    names = ("o", "weights", "gate", "norm_weight")
    leaves = [given[name].requires_grad_() for name in names]
    leaves64 = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y = triton_combine(**given)
    y64 = combine_reference(**(given | dict(zip(names, leaves64, strict=True))))
    dy = draw(*y.shape, dtype=y.dtype, seed=5)
    got = torch.autograd.grad(y, leaves, dy)
    expected = torch.autograd.grad(y64, leaves64, dy.double())
    assert y.shape == y64.shape and y.dtype == given["o"].dtype
    for name, a, b, leaf in zip(("y", *names), (y, *got), (y64, *expected), (y, *leaves), strict=True):
        assert a.shape == b.shape and a.dtype == leaf.dtype, name
        assert relative_error(a, b) <= TOLERANCE[given["o"].dtype], (name, relative_error(a, b))


@pytest.mark.parametrize(
    "topk, shared, masked", [(2, True, False), (2, False, False), (3, True, True), (1, True, False)]
)
def test_matches_reference(topk, shared, masked):
    plan = make_plan(topk=topk, shared=shared, masked=masked, num_memories=5, unpicked=1)
    compare(inputs(plan, 2, 32, topk))


@pytest.mark.parametrize("norm_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16(norm_dtype):
    compare(inputs(make_plan([65, 0, 3], num_memories=5, unpicked=1), 2, 64, 2, torch.bfloat16, norm_dtype))


@pytest.mark.parametrize("size", [16, 256])
def test_head_sizes(size):
    compare(inputs(make_plan([5, 12], num_memories=5, unpicked=1), 3, size, 2))


def test_gate_is_a_view_of_a_wider_tensor():
    compare(inputs(make_plan([5, 12], num_memories=5, unpicked=1), 2, 32, 2, gate_columns=48))


def test_norm_weight_gradient_over_several_blocks(monkeypatch):
    monkeypatch.setattr("mom_layers.combine.triton.GRADIENT_PROGRAMS", 2)
    compare(inputs(make_plan([63, 64, 65], num_memories=5, unpicked=1), 1, 64, 2))


def test_a_token_reaches_only_its_own_rows():
    plan = make_plan([3, 40], num_memories=5, unpicked=1)
    given = inputs(plan, 2, 16, 2)
    o = given["o"].requires_grad_()
    y = triton_combine(**given)
    dy = torch.zeros_like(y)
    dy[7] = 1.0
    (do,) = torch.autograd.grad(y, o, dy)
    own = torch.zeros(plan.num_rows, dtype=torch.bool, device=DEVICE)
    own[plan.row_of_choice[7].long()] = True
    assert (do[~own] == 0).all() and (do[own] != 0).flatten(1).any(1).all()


def test_no_tokens():
    given = inputs(make_plan([0], num_memories=5, unpicked=1), 2, 16, 2)
    y = triton_combine(**(given | dict(norm_weight=given["norm_weight"].requires_grad_())))
    assert y.shape == (0, 2, 16)
    y.sum().backward()
    assert torch.equal(given["norm_weight"].grad, torch.zeros(16, device=DEVICE))


def test_bad_inputs_are_refused():
    given = inputs(make_plan([3, 2], num_memories=5, unpicked=1), 2, 16, 2)
    other_size = dict(o=draw(15, 2, 24), gate=draw(5, 2, 24), norm_weight=draw(24))
    cases = [
        ("o must be float32, bfloat16 or float16 .* got torch.float64", dict(o=given["o"].double())),
        ("norm_weight must be float32, .* got torch.float64", dict(norm_weight=given["norm_weight"].double())),
        (r"V in \(16, 32, 64, 128, 256\) for kernels='triton', got 24", other_size),
        (r"o must be \[15, H, V\] for 5 tokens of 3 choices, got \[14, 2, 16\]", dict(o=draw(14, 2, 16))),
        ("weights must be float32 .* got torch.bfloat16", dict(weights=given["weights"].bfloat16())),
        (r"row_of_choice must be int32 .* got torch.int64", dict(row_of_choice=given["row_of_choice"].long())),
        (r"weights must be \[5, 0 or 1\], got \[5, 2\]", dict(row_of_choice=given["row_of_choice"][:, :1])),
        (r"output_gate must be \[5, 2, 16\], got \[5, 2, 32\]", dict(gate=draw(5, 2, 32))),
        (r"adjacent values .* strides \(32, 1, 2\)", dict(gate=draw(5, 16, 2).transpose(1, 2))),
        (r"norm_weight must be \[16\], got \[32\]", dict(norm_weight=draw(32))),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            triton_combine(**(given | change))


def test_torch_takes_other_sizes_and_types_and_launches_no_kernel(refused_launches):
    given = inputs(make_plan([3, 2], num_memories=5, unpicked=1), 2, 24, 2, torch.float64, torch.float64)
    y = combine(output_gate=given.pop("gate"), kernels="torch", **given)
    assert y.shape == (5, 2, 24) and y.dtype == torch.float64


def test_triton_launches_a_kernel(refused_launches):
    with pytest.raises(RuntimeError, match="_forward_kernel was launched"):
        triton_combine(**inputs(make_plan([3, 2], num_memories=5, unpicked=1), 2, 16, 2))
