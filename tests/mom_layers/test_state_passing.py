"""Sequences cut along time into slices, with states passed on: all results equal one run over the whole sequence."""

import pytest
import torch
from comparison import DEVICE, relative_error
from rules_to_test import composed

from mom_layers.convolve.operation import segment_convolution
from mom_layers.recur.rules import RuleInputs, get_rule
from mom_layers.recur.state_passing import fold_gradients, fold_states, join_tails, last_inputs
from mom_layers.route.plan import build_routing_plan

HEADS, K, V, WIDTH, CHANNELS = 2, 16, 32, 4, 6
# Rows that each slice holds of each segment. Some hold none: at the front, in the middle, at the end, or anywhere; some
# hold more than a chunk.
CUTS = {
    "one slice": [[0, 1, 65, 3]],
    "two": [[5, 0, 64, 1, 0], [1, 70, 0, 1, 0]],
    "four": [[3, 0, 1, 65, 0, 2], [0, 2, 1, 0, 0, 1], [1, 0, 1, 2, 0, 0], [2, 66, 1, 0, 4, 1]],
}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def borders(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def rows_of_slices(cuts):
    """The rows of the whole that every slice holds: the segments one after the other, each in order of time."""
    cuts = torch.tensor(cuts)
    starts = borders(cuts.sum(0).tolist())[:-1] + cuts.cumsum(0) - cuts
    return [
        torch.cat([torch.arange(start, start + length) for start, length in zip(*part, strict=True)])
        for part in zip(starts.tolist(), cuts.tolist(), strict=True)
    ]


def rule_inputs(rule, rows, segments):
    """q, k, v and the rule's gates; an initial state, and gradients of the outputs and of the final state."""
    q, k, v = (random(rows, HEADS, size, seed=seed) for seed, size in enumerate((K, K, V)))
    if rule.unit_length_keys:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    raw = {gate.name: random(rows, HEADS * gate.width(K, V), seed=3) for gate in rule.raw_gates}
    parameters = {name: 0.1 + 0.3 * random(HEADS, *shape, seed=4) for name, shape in rule.parameter_shapes(K).items()}
    inputs = rule.prepare(q, k, v, raw, parameters, "torch")
    shape = rule.state_shape(inputs.k.shape[2], V)
    state, final_gradient = (random(segments, HEADS, *shape, seed=seed) for seed in (5, 6))
    if not rule.linear_in_state:  # sums of positive features, by which the outputs are divided
        state = state.abs()
    return (
        {"q": inputs.q, "k": inputs.k, "v": inputs.v, **inputs.gates},
        state,
        random(rows, HEADS, V, seed=7),
        (final_gradient),
    )


def as_inputs(inputs):
    gates = {name: x for name, x in inputs.items() if name not in ("q", "k", "v")}
    return RuleInputs(inputs["q"], inputs["k"], inputs["v"], gates)


def run(rule, inputs, lengths, state):
    return rule.recur(as_inputs(inputs), borders(lengths), state, True, "torch")


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", composed())
def test_slices_equal_one_run(name, cuts):
    rule, lengths = get_rule(name), torch.tensor(cuts).sum(0).tolist()
    whole, state, do, final_gradient = rule_inputs(rule, sum(lengths), len(lengths))
    whole = {name: x.detach() for name, x in whole.items()}
    leaves = [x.requires_grad_() for x in (*whole.values(), state)]
    o, final_state = run(rule, whole, lengths, state)
    expected = torch.autograd.grad([o, final_state], leaves, [do, final_gradient])

    rows = rows_of_slices(cuts)
    # What is not by row, a parameter, is the same for all slices.
    by_row = [x.shape[0] == sum(lengths) for x in whole.values()]
    slices = [
        {name: (x.detach()[index] if own else x.detach().clone()).requires_grad_()
         for (name, x), own in zip(whole.items(), by_row, strict=True)}
        for index in rows
    ]  # fmt: skip
    transitions, contributions = [], []
    for part, cut in zip(slices, cuts, strict=True):
        transitions.append(rule.transition(as_inputs(part), borders(cut), "torch").detach())
        contributions.append(run(rule, part, cut, None)[1].detach())
        assert transitions[-1].dim() == (3 if rule.diagonal_transition else 4)
    states = fold_states(torch.stack(transitions), torch.stack(contributions), state.detach())
    assert relative_error(states[-1], final_state) < 1e-12

    starts = [before.requires_grad_() for before in states[:-1]]
    outputs = [run(rule, *arguments) for arguments in zip(slices, cuts, starts, strict=True)]
    for (read, after), index, following in zip(outputs, rows, states[1:], strict=True):
        torch.testing.assert_close(read, o[index], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(after, following, rtol=1e-11, atol=1e-12)

    own = [
        torch.autograd.grad(read, start, do[index], retain_graph=True)[0]
        for (read, _), start, index in zip(outputs, starts, rows, strict=True)
    ]
    wanted = fold_gradients(torch.stack(transitions), torch.stack(own), final_gradient)
    assert relative_error(wanted[0], expected[-1]) < 1e-12
    shared = [torch.zeros_like(x) for x in expected[:-1]]
    for number, (part, index) in enumerate(zip(slices, rows, strict=True)):
        got = torch.autograd.grad(outputs[number], list(part.values()), [do[index], wanted[number + 1]])
        for mine, theirs, own, total in zip(got, expected[:-1], by_row, shared, strict=True):
            if own:
                torch.testing.assert_close(mine, theirs[index], rtol=1e-10, atol=1e-12)
            else:
                total += mine
    for total, theirs, own in zip(shared, expected[:-1], by_row, strict=True):
        if not own:
            torch.testing.assert_close(total, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", composed())
def test_an_empty_segment_changes_no_state(name, cuts):
    rule, lengths = get_rule(name), torch.tensor(cuts).sum(0).tolist()
    inputs, *_ = rule_inputs(rule, sum(lengths), len(lengths))
    transition = rule.transition(as_inputs(inputs), borders(lengths), "torch")
    unchanged = (
        torch.ones(HEADS, inputs["k"].shape[2]) if rule.diagonal_transition else torch.eye(K).expand(HEADS, K, K)
    )
    for length, matrix in zip(lengths, transition, strict=True):
        changes = not torch.equal(matrix, unchanged.double())
        assert length or not changes
        if rule.cost_without_kernels is None:  # the gates of a rule from an equation may change writes alone
            assert changes == (length > 0 and len(inputs) > 3)  # a rule without gates forgets nothing


@pytest.mark.parametrize("name", composed())
def test_transition_of_the_kernels(name):
    rule, lengths = get_rule(name), [17, 0, 1, 66]
    inputs, *_ = rule_inputs(rule, sum(lengths), len(lengths))
    expected = rule.transition(as_inputs(inputs), borders(lengths), "torch")
    inputs = {name: x.float().to(DEVICE) for name, x in inputs.items()}
    got = rule.transition(as_inputs(inputs), borders(lengths).to(DEVICE), "triton")
    assert got.dtype == torch.float32 and relative_error(got, expected) < 1e-5


def test_nothing_comes_before_the_first_slice():
    none = torch.zeros(0, 3, HEADS, K, V, dtype=torch.float64)
    (state,) = fold_states(none.new_zeros(0, 3, HEADS, K, K), none)
    assert state.shape == (3, HEADS, K, V) and not state.any()
    (gradient,) = fold_gradients(none.new_zeros(0, 3, HEADS, K), none)
    assert not gradient.any()


def plan_of(lengths):
    """Rows are the tokens in their order: one memory, which every token goes to."""
    everyone = torch.zeros(sum(lengths), 1, dtype=torch.int32)
    return build_routing_plan(everyone, borders(lengths), num_memories=1, shared=False, kernels="torch")


def convolve(x, weight, lengths, tail, gather):
    options = {"gather": gather, "initial_tail": tail, "output_tail": True, "kernels": "torch"}
    return segment_convolution(x, weight, plan_of(lengths), **options)


@pytest.mark.parametrize("gather", [False, True], ids=["rows", "tokens"])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_tails_of_slices_equal_one_convolution(cuts, gather):
    lengths = torch.tensor(cuts).sum(0).tolist()
    x = random(sum(lengths), CHANNELS, seed=0).requires_grad_()
    weight = random(CHANNELS, WIDTH, seed=1).requires_grad_()
    y, after = convolve(x, weight, lengths, None, gather)
    dy, dafter = random(*y.shape, seed=2), random(*after.shape, seed=3)
    expected = torch.autograd.grad([y, after], [x, weight], [dy, dafter])

    rows = rows_of_slices(cuts)
    inputs, tails = [], []
    for index, cut in zip(rows, cuts, strict=True):
        edges = borders(cut)
        tokens = plan_of(cut).token_of_row if gather else None
        part, tail = last_inputs(x[index], edges[None, :-1], edges[None, 1:], WIDTH, tokens)
        inputs.append(part)
        tails.append(tail)
    tails, counts = torch.stack(tails), torch.tensor(cuts).clamp(max=WIDTH - 1)
    outputs = []
    for number, (index, cut) in enumerate(zip(rows, cuts, strict=True)):
        before = join_tails(tails[:number], counts[:number])
        got, _ = convolve(inputs[number], weight, cut, before, gather)
        torch.testing.assert_close(got, y[index], rtol=1e-12, atol=1e-13)
        outputs.append(got)
    last = join_tails(tails, counts)
    torch.testing.assert_close(last, after, rtol=0, atol=0)
    got = torch.autograd.grad([*outputs, last], [x, weight], [*(dy[index] for index in rows), dafter])
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_full_count_hides_the_slices_before():
    """A slice in which a sequence begins gives a full count, although its tail may hold fewer inputs."""
    tails = torch.ones(2, 1, WIDTH - 1, CHANNELS)
    tails[1, :, :-1] = 0
    joined = join_tails(tails, torch.tensor([[WIDTH - 1], [WIDTH - 1]]))
    assert torch.equal(joined, tails[1])
