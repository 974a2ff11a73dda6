"""The grouped projection against one float64 product for each memory: the output and both gradients."""

import pytest
import torch
from comparison import DEVICE, TOLERANCE, draw, inputs, layer, make_plan, relative_error

from mom_layers.project import operation
from mom_layers.project.operation import grouped_projection
from mom_layers.project.triton import TILES
from mom_layers.route.plan import build_routing_plan

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def without_pytorchs_grouped_product(monkeypatch):
    """So that Triton's kernels run on a Hopper GPU too."""
    monkeypatch.setattr(operation, "has_device_grouped_mm", lambda x, weight: False)


@pytest.fixture
def with_pytorchs_grouped_product(without_pytorchs_grouped_product, monkeypatch):
    monkeypatch.setattr(operation, "has_device_grouped_mm", lambda x, weight: True)


def triton_projection(x, weight, plan):
    return grouped_projection(x, weight, plan, kernels="triton")


def reference(x, weight, plan):
    ends = plan.memory_offsets.tolist()
    rows = x[plan.token_of_row.long()]
    return torch.cat([rows[a:b] @ w.t() for a, b, w in zip([0, *ends[:-1]], ends, weight, strict=True)])


def compare(plan, width, outputs, dtype=torch.float32, slice_of=None):
    wide = draw(plan.row_of_choice.shape[0], slice_of or width, dtype=dtype)
    x = wide[:, wide.shape[1] - width :].requires_grad_()
    weight = draw(plan.num_all_memories, outputs, width, dtype=dtype, seed=2).requires_grad_()
    x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight))
    rows, rows64 = triton_projection(x, weight, plan), reference(x64, weight64, plan)
    drows = draw(*rows.shape, dtype=dtype, seed=3)
    got = torch.autograd.grad(rows, [x, weight], drows)
    expected = torch.autograd.grad(rows64, [x64, weight64], drows.double())
    for name, a, b in zip(("rows", "dx", "dweight"), (rows, *got), (rows64, *expected), strict=True):
        assert a.shape == b.shape and a.dtype == dtype, name
        assert relative_error(a, b) <= TOLERANCE.get(dtype, 1e-2), (name, relative_error(a, b))
    return got[1]


@pytest.mark.parametrize(
    "dtype, width, outputs", [(torch.float32, 24, 72), (torch.bfloat16, 72, 136), (torch.float16, 136, 24)]
)
def test_matches_reference(dtype, width, outputs):
    compare(make_plan(), width, outputs, dtype)


@pytest.mark.parametrize("masked, shared, topk", [(True, True, 2), (False, False, 2), (True, False, 1)])
def test_masked_tokens_and_unpicked_memories(masked, shared, topk):
    plan = make_plan([40, 0, 30], masked=masked, shared=shared, topk=topk, unpicked=2)
    dweight = compare(plan, 24, 40)
    assert (dweight[:2] == 0).all()


def test_every_token_chooses_the_first_memory_and_none_the_last():
    plan = build_routing_plan(
        torch.zeros(130, 1, dtype=torch.long, device=DEVICE),
        torch.tensor([0, 130], dtype=torch.int32, device=DEVICE),
        num_memories=3,
        shared=False,
        kernels="torch",
    )
    dweight = compare(plan, 16, 8)
    assert (dweight[1:] == 0).all()


def test_memories_whose_rows_end_on_a_tile():
    tile = TILES[torch.float32].BM
    compare(make_plan([tile, tile], num_memories=2), 16, 16)


def test_column_slice_and_many_columns():
    compare(make_plan([5, 40], num_memories=2, topk=1), 16, 136, slice_of=64)


def test_odd_sizes():
    compare(make_plan([9, 1]), 5, 9)


def test_transposed_weight():
    plan = make_plan([9])
    x, weight = draw(9, 16), draw(plan.num_all_memories, 16, 24, seed=2).transpose(1, 2)
    assert relative_error(triton_projection(x, weight, plan), reference(x.double(), weight.double(), plan)) <= 1e-5


def test_no_tokens():
    plan = make_plan([0, 0])
    weight = draw(plan.num_all_memories, 8, 16).requires_grad_()
    rows = triton_projection(draw(0, 16), weight, plan)
    assert rows.shape == (0, 8)
    rows.sum().backward()
    assert (weight.grad == 0).all()


def test_a_row_reaches_only_its_token_and_its_memory():
    plan = make_plan([3, 30])
    x, weight = draw(33, 16).requires_grad_(), draw(plan.num_all_memories, 8, 16, seed=2).requires_grad_()
    rows = triton_projection(x, weight, plan)
    drows = torch.zeros_like(rows)
    drows[0] = 1.0
    dx, dweight = torch.autograd.grad(rows, [x, weight], drows)
    token = plan.token_of_row[0].item()
    assert (dx[token] != 0).all() and dx.count_nonzero() == 16
    assert (dweight[0] != 0).all() and (dweight[1:] == 0).all()


def test_bad_inputs_are_refused():
    plan = make_plan([3, 2])
    x, weight = draw(5, 16), draw(plan.num_all_memories, 8, 16)
    cases = [
        ("float64", x.double(), weight),
        (r"adjacent channels .* strides \(1, 5\)", draw(16, 5).t(), weight),
        (r"x must be \[5, D\] for this plan, got \[4, 16\]", x[:4], weight),
        ("as x is for kernels='triton', got torch.bfloat16", x, weight.bfloat16()),
        (r"weight must be \[5, O, 16\] .* got \[5, 8, 24\]", x, draw(plan.num_all_memories, 8, 24)),
        (r"weight must be \[5, O, 16\] .* got \[3, 8, 16\]", x, weight[:3]),
    ]
    for message, bad_x, bad_weight in cases:
        with pytest.raises(ValueError, match=message):
            triton_projection(bad_x, bad_weight, plan)


def test_columns_that_are_not_aligned_are_padded(with_pytorchs_grouped_product):
    """PyTorch's grouped product, where rows are no multiple of 16 bytes: a tensor-parallel rank's few heads."""
    plan, columns = make_plan([9, 30]), 10
    x = draw(39, 16, dtype=torch.bfloat16).requires_grad_()
    weight = draw(plan.num_all_memories, columns, 16, dtype=torch.bfloat16, seed=2).requires_grad_()
    rows = grouped_projection(x, weight, plan)
    assert rows.shape == (plan.num_rows, 16) and (rows[:, columns:] == 0).all()
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference(*doubles, plan)
    drows = draw(*expected.shape, dtype=torch.bfloat16, seed=3)
    got = [rows[:, :columns], *torch.autograd.grad(rows[:, :columns], [x, weight], drows)]
    wanted = [expected, *torch.autograd.grad(expected, doubles, drows.double())]
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and relative_error(a, b) <= 1e-2


def test_a_layer_takes_padded_columns(monkeypatch):
    """Keys, values and raw gates are the same columns, in both passes."""
    mixer = layer(torch.bfloat16, kernels="triton")  # 34 columns a memory
    x = inputs(2, 9, dtype=torch.bfloat16)

    def run():
        y = mixer(x)[0]
        return [y, *torch.autograd.grad(y, [x, *mixer.parameters()], torch.ones_like(y))]

    expected = run()
    monkeypatch.setattr(operation, "has_device_grouped_mm", lambda x, weight: True)
    for a, b in zip(run(), expected, strict=True):
        assert relative_error(a, b) <= 2e-2


def project_and_differentiate(kernels):
    plan = make_plan([9, 30])
    x = draw(39, 16, dtype=torch.bfloat16).requires_grad_()
    weight = draw(plan.num_all_memories, 8, 16, dtype=torch.bfloat16, seed=2).requires_grad_()
    rows = grouped_projection(x, weight, plan, kernels=kernels)
    doubles = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = reference(*doubles, plan)
    for a, b in zip(
        (rows, *torch.autograd.grad(rows.float().sum(), [x, weight])),
        (expected, *torch.autograd.grad(expected.sum(), doubles)),
        strict=True,
    ):
        assert relative_error(a, b) <= 1e-2


def test_torch_launches_no_kernel(refused_launches):
    project_and_differentiate("torch")


def test_torch_launches_no_kernel_beside_pytorchs_grouped_product(with_pytorchs_grouped_product, refused_launches):
    project_and_differentiate("torch")


def test_triton_launches_kernels(refused_launches):
    with pytest.raises(RuntimeError, match="_project_kernel was launched"):
        project_and_differentiate("triton")


def test_triton_adds_up_a_tokens_rows_beside_pytorchs_grouped_product(with_pytorchs_grouped_product, refused_launches):
    with pytest.raises(RuntimeError, match="_sum_rows_kernel was launched"):
        project_and_differentiate("triton")
