"""The convolution in Triton against plain loops in float64: outputs, tails and every gradient."""

import pytest
import torch
from comparison import DEVICE, RAGGED, TOLERANCE, draw, make_plan, relative_error

from mom_layers.convolve.operation import segment_convolution
from mom_layers.convolve.qkv import convolve_qkv
from mom_layers.convolve.reference import segment_convolution_reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# More rows than one program walks along, and few enough for the interpreter.
LENGTHS = RAGGED if DEVICE == "cuda" else [1, 0, 2, 40, 3]


def triton_convolution(x, weight, plan, gather, heads=None, initial_tail=None, output_tail=False, silu=True):
    return segment_convolution(
        x, weight, plan, gather=gather, unit_length_heads=heads, silu=silu, initial_tail=initial_tail,
        output_tail=output_tail, kernels="triton",
    )  # fmt: skip


def leaf(tensor, dtype=None):
    return None if tensor is None else tensor.detach().to(dtype or tensor.dtype).requires_grad_()


def compare(plan, gather, channels, width, heads, with_tails, dtype=torch.float32, slice_of=None, silu=True):
    inputs = plan.row_of_choice.shape[0] if gather else plan.num_rows
    wide = draw(inputs, slice_of or channels, dtype=dtype)
    x = wide[:, wide.shape[1] - channels :].requires_grad_()
    weight = leaf(draw(channels, width, dtype=dtype, seed=2))
    initial = leaf(draw(plan.num_segments, width - 1, channels, dtype=dtype, seed=3)) if with_tails else None
    y, tail = triton_convolution(x, weight, plan, gather, heads, initial, with_tails, silu)

    x64, weight64, initial64 = (leaf(t, torch.float64) for t in (x, weight, initial))
    rows64 = x64[plan.token_of_row.long()] if gather else x64
    y64, tail64 = segment_convolution_reference(rows64, weight64, plan.cu_seqlens, heads, initial64, silu)

    outputs, outputs64 = ([y, tail], [y64, tail64]) if with_tails else ([y], [y64])
    leaves, leaves64 = (
        ([x, weight, initial], [x64, weight64, initial64]) if with_tails else ([x, weight], [x64, weight64])
    )
    grads = [draw(*out.shape, dtype=dtype, seed=4 + i) for i, out in enumerate(outputs)]
    got = torch.autograd.grad(outputs, leaves, grads)
    expected = torch.autograd.grad(outputs64, leaves64, [g.double() for g in grads])
    names = ["y", "tail"][: len(outputs)] + ["dx", "dweight", "dinitial_tail"][: len(leaves)]
    for name, a, b in zip(names, [*outputs, *got], [*outputs64, *expected], strict=True):
        assert a.shape == b.shape and a.dtype == dtype, name
        assert relative_error(a, b) <= TOLERANCE[dtype], (name, relative_error(a, b))
    if tail is not None:
        assert torch.equal(tail.double(), tail64)


@pytest.mark.parametrize(
    "gather, heads, with_tails", [(False, None, False), (False, 2, True), (True, None, True), (True, 2, False)]
)
def test_matches_reference(gather, heads, with_tails):
    compare(make_plan(LENGTHS), gather, 32, 4, heads, with_tails)


@pytest.mark.parametrize("heads", [None, 2])
def test_matches_reference_without_silu(heads):
    compare(make_plan(LENGTHS), False, 32, 4, heads, True, silu=False)


@pytest.mark.parametrize("gather, heads", [(True, 2), (False, None)])
def test_bfloat16(gather, heads):
    compare(make_plan([0, 3, 35]), gather, 32, 4, heads, True, dtype=torch.bfloat16)


@pytest.mark.parametrize("masked, shared, unpicked", [(True, True, 0), (True, False, 2), (False, False, 2)])
def test_masked_tokens_and_unpicked_memories(masked, shared, unpicked):
    compare(make_plan([2, 0, 50, 1], masked=masked, shared=shared, unpicked=unpicked), True, 16, 4, 1, True)


@pytest.mark.parametrize("width", [2, 3, 8])
def test_widths_and_odd_channels(width):
    compare(make_plan([1, 0, 2, 5, 20]), width == 3, 21, width, None, True)


@pytest.mark.parametrize("gather", [False, True])
def test_column_slice_is_not_copied(gather):
    compare(make_plan([3, 0, 17]), gather, 32, 4, 2, False, slice_of=80)


def test_whole_head_of_256():
    compare(make_plan([7, 12]), False, 256, 4, 1, False)


def test_weight_gradient_over_several_blocks(monkeypatch):
    monkeypatch.setattr("mom_layers.convolve.triton.BACKWARD_RUN", 16)
    compare(make_plan([60, 40]), False, 16, 4, 1, False)


def test_no_tokens():
    plan = make_plan([0, 0])
    x, weight, initial = leaf(draw(0, 16)), leaf(draw(16, 4)), leaf(draw(plan.num_segments, 3, 16))
    y, tail = triton_convolution(x, weight, plan, True, None, initial, True)
    (y.sum() + (tail * initial.detach()).sum()).backward()
    assert y.shape == (0, 16) and torch.equal(tail, initial)
    assert torch.equal(initial.grad, initial) and (weight.grad == 0).all() and x.grad.shape == (0, 16)


@pytest.mark.parametrize("gather", [False, True])
def test_nothing_crosses_segments(gather):
    plan = make_plan(LENGTHS)
    x = leaf(draw(plan.row_of_choice.shape[0] if gather else plan.num_rows, 16))
    y, _ = triton_convolution(x, draw(16, 4, seed=2), plan, gather, 1)
    segment = plan.num_sequences - 1  # memory 0's part of the last sequence
    inside = plan.segment_of_row == segment
    (dx,) = torch.autograd.grad(y, x, torch.where(inside[:, None], torch.ones_like(y), 0.0))
    reached = torch.zeros(x.shape[0], dtype=torch.bool, device=DEVICE)
    reached[plan.token_of_row[inside].long() if gather else inside] = True
    assert (dx[~reached] == 0).all() and (dx[reached] != 0).any(1).all()


def test_only_the_tail_has_a_gradient():
    plan = make_plan([2, 5])
    x = leaf(draw(plan.num_rows, 16))
    y, tail = triton_convolution(x, draw(16, 4, seed=2), plan, False, None, None, True)
    (dx,) = torch.autograd.grad(tail, x, torch.ones_like(tail))
    later = plan.cu_seqlens[1:][plan.segment_of_row.long()] - 1 - torch.arange(plan.num_rows, device=DEVICE)
    assert torch.equal(dx, (later < 3).float()[:, None].expand_as(dx))


def test_bad_inputs_are_refused():
    plan = make_plan([3, 2])
    x, weight = draw(plan.num_rows, 32), draw(32, 4)
    cases = [
        ("x must be float32, .* got torch.float64", dict(x=x.double())),
        (r"adjacent channels .* strides \(1, 15\)", dict(x=draw(32, plan.num_rows).t())),
        (r"x must be \[5, C\] for the 5 tokens of this plan, got \[15, 32\]", dict(gather=True)),
        ("at most 8 wide for kernels='triton', got 9", dict(weight=draw(32, 9))),
        (r"weight must be \[32, W\] with W >= 1, got \[16, 4\]", dict(weight=draw(16, 4))),
        (r"weight must be \[32, W\] with W >= 1, got \[32, 0\]", dict(weight=draw(32, 0))),
        ("weight and initial_tail must be float32, .* got torch.float64 and None", dict(weight=weight.double())),
        ("a divisor of the 32 channels, got 3", dict(heads=3)),
        ("a divisor of the 32 channels, got 0", dict(heads=0)),
        ("got 32 channels in 4 heads", dict(heads=4)),
        (r"initial_tail must be \[10, 3, 32\], got \[2, 3, 32\]", dict(initial_tail=draw(2, 3, 32))),
    ]
    for message, change in cases:
        with pytest.raises(ValueError, match=message):
            triton_convolution(**(dict(x=x, weight=weight, plan=plan, gather=False) | change))


def test_torch_takes_other_sizes_and_types_and_launches_no_kernel(refused_launches):
    plan = make_plan([3, 2])
    x = leaf(draw(5, 36), torch.float64)
    y, tail = segment_convolution(
        x, draw(36, 9).double(), plan, gather=True, unit_length_heads=3, output_tail=True, kernels="torch"
    )
    (dx,) = torch.autograd.grad(y.sum() + tail.sum(), x)
    assert y.dtype == tail.dtype == dx.dtype == torch.float64 and (dx != 0).all()


def test_triton_launches_a_kernel(refused_launches):
    plan = make_plan([3, 2])
    with pytest.raises(RuntimeError, match="_forward_kernel was launched"):
        triton_convolution(draw(5, 16), draw(16, 4), plan, True)


@pytest.mark.parametrize("with_tails, raw_gates_have_gradient", [(True, True), (False, False)])
def test_three_convolutions_in_one_launch(with_tails, raw_gates_have_gradient):
    plan, channels, columns = make_plan([2, 0, 39], masked=True), (32, 32, 48), 6
    shapes = [(plan.row_of_choice.shape[0], 32), (plan.num_rows, 32 + 48 + columns), *((c, 4) for c in channels)]
    shapes += [(plan.num_segments, 3, c) for c in channels] if with_tails else []
    leaves = [leaf(draw(*shape, seed=i)) for i, shape in enumerate(shapes)]

    def convolve(kernels):
        tails = leaves[5:] if with_tails else (None,) * 3
        *rows, new_tails = convolve_qkv(
            *leaves[:5], plan, unit_length_heads=2, tails=tails, output_tail=with_tails, kernels=kernels
        )
        outputs = [*rows, *(new_tails if with_tails else ())]
        used = [out for i, out in enumerate(outputs) if raw_gates_have_gradient or i != 3]
        grads = [draw(*out.shape, seed=20 + i) for i, out in enumerate(used)]
        return [*outputs, *torch.autograd.grad(used, leaves, grads)]

    for i, (a, b) in enumerate(zip(convolve("triton"), convolve("torch"), strict=True)):
        assert a.shape == b.shape and relative_error(a, b) <= TOLERANCE[torch.float32], i


def test_convolutions_of_one_launch_must_be_equally_wide():
    plan = make_plan([3])
    with pytest.raises(ValueError, match=r"q_conv, k_conv and v_conv must be equally wide, got \[4, 3, 4\]"):
        convolve_qkv(
            draw(3, 16), draw(plan.num_rows, 32), draw(16, 4), draw(16, 3), draw(16, 4), plan, unit_length_heads=1
        )
