"""A part of a plan, with spare rows: which rows it has; memories in parts compute what they compute together."""

import pytest
import torch
from comparison import DEVICE, draw, make_plan, relative_error

from mom_layers.common import checks
from mom_layers.mixing import MemoryParameters, read_memories
from mom_layers.recur.rules import get_rule
from mom_layers.route.plan_part import plan_of_memories
from mom_layers.route.spare_rows import zero_spare_gradients, zero_spare_rows_
from mom_layers.settings import MixerSettings

HEADS, SIZE, HIDDEN = 1, 16, 24
LENGTHS = [5, 0, 70, 3]


def test_a_part_has_the_rows_of_its_memories_and_then_spare_rows():
    plan = make_plan(LENGTHS, unpicked=1, shared=False)
    begin, end = plan.memory_offsets[[0, 2]].tolist()
    part, row_here = plan_of_memories(plan, 1, 2)
    used, rows = end - begin, 2 * sum(LENGTHS)
    assert part.num_rows == rows > used and row_here.tolist() == [*range(begin, end), *[-1] * (rows - used)]
    assert torch.equal(part.token_of_row[:used], plan.token_of_row[begin:end])
    assert torch.equal(part.position_of_row[:used], plan.position_of_row[begin:end])
    assert (part.segment_of_row.diff() >= 0).all() and part.segment_of_row[used:].tolist() == [8] * (rows - used)
    assert part.cu_seqlens.tolist() == [*(plan.cu_seqlens[4:13] - begin).tolist(), rows]
    expected = [[row - begin if begin <= row < end else -1 for row in rows] for rows in plan.row_of_choice.tolist()]
    assert part.row_of_choice.tolist() == expected and part.memory_offsets[-1] == used


@pytest.mark.parametrize("first,count", [(-1, 1), (0, 0), (3, 2)])
def test_memories_that_the_plan_lacks_are_refused(first, count):
    with pytest.raises(ValueError, match="the plan has 4 memories"):
        plan_of_memories(make_plan(shared=False), first, count)


@pytest.mark.parametrize("options", [{"masked": True}, {"masked": False}])
def test_a_part_of_a_part_or_of_a_masked_plan_is_refused(options):
    plan = make_plan(shared=False, **options)
    if not options["masked"]:
        plan, _ = plan_of_memories(plan, 0, 2)
    with pytest.raises(ValueError, match="a row for every choice"):
        plan_of_memories(plan, 0, 1)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spare_rows_and_their_gradients_become_zero(kernels, dtype):
    part, row_here = plan_of_memories(make_plan(LENGTHS, shared=False), 1, 2)
    spare = row_here < 0
    for shape in [(), (3,), (2, 70)]:
        x = draw(part.num_rows, *shape, dtype=dtype).requires_grad_()
        given = draw(part.num_rows, *shape, dtype=dtype, seed=2)
        given[spare] = float("nan")
        (same,) = zero_spare_gradients((x,), part, kernels=kernels)
        (dx,) = torch.autograd.grad(same, x, given.clone())
        expected = torch.where(spare.view(-1, *[1] * len(shape)), 0, given)
        assert torch.equal(same, x) and torch.equal(dx, expected)
        assert torch.equal(zero_spare_rows_(given, part, kernels=kernels), expected)


def parameters(rule, num_memories):
    rule = get_rule(rule)
    torch.manual_seed(0)
    own = rule.init_parameters(HEADS, SIZE)
    return MemoryParameters(
        settings=MixerSettings(HEADS, SIZE, 1.0, rule=rule.name),
        projection=0.5 * draw(num_memories, sum(rule.projection_sizes(HEADS, SIZE, SIZE)), HIDDEN),
        q_conv=draw(HEADS * SIZE, 4, seed=2),
        k_conv=draw(HEADS * SIZE, 4, seed=3),
        v_conv=draw(HEADS * SIZE, 4, seed=4),
        rule_parameters={name: tensor.to(DEVICE) for name, tensor in own.items()},
        norm_weight=draw(SIZE, seed=5),
    )


def read(plan, weights, projection, kernels):
    """o of every row, and a function of gradients of x, q and all weights but the projection, and of the projection."""
    x, q = (draw(sum(LENGTHS), width, seed=6).requires_grad_() for width in (HIDDEN, HEADS * SIZE))
    leaves = {"x": x, "q": q, "projection": projection} | weights.rule_parameters
    leaves |= {name: getattr(weights, name) for name in ("q_conv", "k_conv", "v_conv")}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items()}
    given = MemoryParameters(**{
        **vars(weights), **{name: leaves[name] for name in ("projection", "q_conv", "k_conv", "v_conv")},
        "rule_parameters": {name: leaves[name] for name in weights.rule_parameters},
    })  # fmt: skip
    o, _ = read_memories(leaves["x"], leaves["q"], plan, given, kernels=kernels)
    return o, lambda do: dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), do), strict=True))


@pytest.mark.parametrize("skip", [False, True], ids=["spare rows computed", "spare rows skipped"])
@pytest.mark.parametrize("rule", ["gated_deltanet", "gla"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_memories_in_parts_read_what_they_read_together(kernels, rule, skip, poisoned_memory, monkeypatch):
    if skip:
        monkeypatch.setattr(checks, "checks_values", lambda tensor: False)
    plan = make_plan(LENGTHS, num_memories=4, unpicked=1, shared=False)  # memory 0 is empty
    weights = parameters(rule, 4)
    o, gradients = read(plan, weights, weights.projection, kernels)
    do = draw(*o.shape, seed=7)
    expected, got, outputs = gradients(do), {}, []
    for first, count in ((0, 1), (1, 1), (2, 2)):
        part, row_here = plan_of_memories(plan, first, count)
        used = row_here >= 0
        here, part_gradients = read(part, weights, weights.projection[first : first + count], kernels)
        outputs.append(here[used])
        do_here = torch.where(used[:, None, None], do[row_here.clamp(min=0).long()], 0)
        for name, gradient in part_gradients(do_here).items():
            if name == "projection":
                got.setdefault(name, []).append(gradient)
            else:
                got[name] = got[name] + gradient if name in got else gradient
    got["projection"] = torch.cat(got["projection"])
    assert relative_error(torch.cat(outputs), o) <= 1e-5
    for name, gradient in expected.items():
        assert relative_error(got[name], gradient) <= (3e-5 if name in weights.rule_parameters else 1e-5), name
