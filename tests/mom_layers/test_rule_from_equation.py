"""A rule made from its equation, beside a rule that is written by hand."""

import importlib
import re
import warnings

import pytest
import torch
from comparison import relative_error
from documents import python_code, read

from mom_layers import LinearAttentionLayer, MixtureOfMemories, RawGate, get_rule, rule_from_equation
from mom_layers.recur.rules import RuleInputs, gated_deltanet, registry
from mom_layers.selftest.cases import Setting
from mom_layers.selftest.checks import all_checks, checks_of_a_run, tiny_checks
from mom_layers.settings import MixerSettings

HEADS, K, V = 2, 16, 32


def step(state, k, v, gates):
    state = state * gates["g"].exp()[..., None, None]
    delta = (v - torch.einsum("nhk,nhkv->nhv", k, state)) * gates["beta"][..., None]
    return state + torch.einsum("nhk,nhv->nhkv", k, delta)


@pytest.fixture
def twin(monkeypatch):
    """gated_deltanet, from its equation."""
    theirs = gated_deltanet.RULE
    rule = rule_from_equation(
        "twin", step, gates=lambda raw, parameters: gated_deltanet.gates(raw, parameters, "torch"),
        raw_gates=theirs.raw_gates, parameter_shapes=theirs.parameter_shapes, init_parameters=theirs.init_parameters,
    )  # fmt: skip
    monkeypatch.setitem(registry._RULES, "twin", rule)
    monkeypatch.setattr(importlib.import_module("mom_layers.recur.rules.rule"), "_WARNED", set())
    return rule


def test_is_the_rule_of_that_equation(twin):
    theirs = get_rule("gated_deltanet")
    torch.manual_seed(0)
    ends = torch.tensor([0, 3, 3, 10, 11], dtype=torch.int32)
    q, k = (torch.nn.functional.normalize(torch.randn(11, HEADS, K, dtype=torch.float64), dim=-1) for _ in range(2))
    v, raw = torch.randn(11, HEADS, V, dtype=torch.float64), torch.randn(2, 11, HEADS, dtype=torch.float64)
    state = torch.randn(4, HEADS, K, V, dtype=torch.float64)
    parameters = {name: x.double() for name, x in twin.init_parameters(HEADS, K).items()}
    leaves = [x.requires_grad_() for x in (q, k, v, raw, state, *parameters.values())]
    found = []
    for rule in (twin, theirs):
        gates = {"beta": raw[0], "a": raw[1]}
        inputs = rule.prepare(q, k, v, gates, parameters, "torch")
        o, last = rule.recur(inputs, ends, state, True, "torch")
        gradients = torch.autograd.grad((o.sin().sum() + last.cos().sum()), leaves)
        loop = rule.reference(q.detach(), k.detach(), v, gates, parameters, ends, state)
        found.append([o, last, *gradients, rule.transition(inputs, ends, "torch"), *loop])
        assert rule.recur(inputs, ends, None, False, "torch")[1] is None
    for mine, right in zip(*found, strict=True):
        assert relative_error(mine, right) <= 1e-9


@pytest.mark.parametrize("make", [MixtureOfMemories, LinearAttentionLayer])
def test_a_layer_warns_once_trains_and_decodes(twin, make):
    with pytest.warns(UserWarning, match="the update rule twin has no kernels: its recurrence runs token by token"):
        module = make(24, rule="twin", num_heads=HEADS, head_dim=K)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(24, rule="twin", num_heads=HEADS, head_dim=K)
    x = torch.randn(2, 7, 24)
    whole, _ = module(x)
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    first, state = module(x[:, :5], output_state=True)
    steps = [module.step(x[:, t], state) for t in (5, 6)]
    assert relative_error(torch.cat([first, torch.stack(steps, 1)], 1), whole) <= 1e-5


def test_no_tokens(twin):
    inputs = twin.prepare(
        *(torch.zeros(0, HEADS, n) for n in (K, K, V)), {name: torch.zeros(0, HEADS) for name in ("beta", "a")},
        twin.init_parameters(HEADS, K), "torch",
    )  # fmt: skip
    o, state = twin.recur(inputs, torch.zeros(3, dtype=torch.int32), None, True, "torch")
    assert o.shape == (0, HEADS, V) and state.shape == (2, HEADS, K, V) and not state.any()


def test_rows_after_the_last_segment_change_nothing(twin):
    """A plan with spare rows: the borders end before the rows do."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, HEADS, size).requires_grad_() for size in (K, K, V))
    raw = {name: torch.randn(9, HEADS) for name in ("beta", "a")}
    inputs = twin.prepare(q, k, v, raw, twin.init_parameters(HEADS, K), "torch")
    ends = torch.tensor([0, 4, 4, 5], dtype=torch.int32)
    o, states = twin.recur(inputs, ends, None, True, "torch")
    gates = {name: gate[:5] for name, gate in inputs.gates.items()}
    used, last = get_rule("gated_deltanet").recur(RuleInputs(q[:5], k[:5], v[:5], gates), ends, None, True, "torch")
    assert o.shape == (9, HEADS, V)
    assert relative_error(o[:5], used) <= 1e-5 and relative_error(states, last) <= 1e-5
    o[:5].sum().backward()
    assert all(not x.grad[5:].any() and x.grad[:5].any() for x in (q, k, v))


def squashed(state, k, v, gates):
    """Not linear."""
    return torch.tanh(state) + torch.einsum("nhk,nhv->nhkv", k, v)


def growing(state, k, v, gates):
    """Linear but for a constant."""
    return state + torch.einsum("nhk,nhv->nhkv", k, v) + 1


def column_wise(state, k, v, gates):
    """Linear, with a decay for each column of the state."""
    return gates["f"].sigmoid()[:, :, None] * state + torch.einsum("nhk,nhv->nhkv", k, v)


def row_wise(state, k, v, gates):
    """Linear, with a decay for each row of the state, in float32."""
    return (gates["f"].sigmoid()[..., None] * state).float() + torch.einsum("nhk,nhv->nhkv", k, v)


@pytest.mark.parametrize(
    ("step", "columns", "slices", "message"),
    [
        (row_wise, "key", 4, None),
        (column_wise, "value", 2, None),
        (column_wise, "value", 3, "treats the columns .* --context-parallel-size must be 1 or 2, got 3"),
        (squashed, 1, 2, "the step of the update rule tried is not linear in the state and v .* cut .* into 2 slices"),
        (growing, 1, 4, "not linear in the state and v together"),
    ],
)
def test_context_parallelism_refuses_a_step_that_it_cannot_compose(step, columns, slices, message):
    rule = rule_from_equation("tried", step, raw_gates=(RawGate("f", columns, "f"),))
    before = torch.random.get_rng_state()
    if message is None:
        rule.check_slices(K, V, slices)
    else:
        with pytest.raises(ValueError, match=message):
            rule.check_slices(K, V, slices)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_self_test_leaves_out_a_rule_without_kernels(twin):
    setting = Setting("cpu", torch.bfloat16)
    assert [name for checks in (all_checks, tiny_checks) for name in checks(setting) if "twin" in name] == []
    names = {}
    for rule in ("gla", "twin"):
        names[rule] = set(checks_of_a_run(setting, MixerSettings(rule=rule, head_dim=16), 40, sliced=True))
    assert "twin" in names["twin"] and names["gla"] - names["twin"] == {"gla", "state passing"}


def test_a_rule_that_composes_is_accepted(twin):
    twin.check_slices(K, V, 4)


@pytest.mark.parametrize("given", [None, lambda raw, parameters: {name: 2 * gate for name, gate in raw.items()}])
def test_shapes_of_raw_gates(given):
    """A raw gate of one column is [R, H]; raw gates of more columns are [R, H, columns]."""
    columns = {"one": 1, "two": 2, "keys": "key", "values": "value"}
    raw_gates = tuple(RawGate(name, number, name[0]) for name, number in columns.items())
    rule = rule_from_equation("shapes", column_wise, raw_gates=raw_gates, gates=given)
    raw = {gate.name: torch.randn(5, HEADS * gate.width(K, V)) for gate in raw_gates}
    q, k, v = (torch.randn(5, HEADS, size) for size in (K, K, V))
    found = rule.prepare(q, k, v, raw, {}, "torch").gates
    shapes = {"one": (), "two": (2,), "keys": (K,), "values": (V,)}
    assert {name: gate.shape for name, gate in found.items()} == {n: (5, HEADS, *s) for n, s in shapes.items()}
    factor = 1 if given is None else 2
    assert all(torch.equal(gate.flatten(1), factor * raw[name]) for name, gate in found.items())


def test_the_page_about_a_rule_of_ones_own(monkeypatch):
    """The page's rule is that of the example, and its second rule does what the page says."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    names = {}
    code = python_code("docs/own-rule.md")
    exec(compile(code, "docs/own-rule.md", "exec"), names)
    first = without_comments(code.split("register_rule(")[0].partition("def step")[2])
    example = without_comments(read("examples/own_rule.py").split("register_rule(")[0].partition("def step")[2])
    assert first == example and "leaky" in registry._RULES

    rule = rule_from_equation(
        "longhorn", names["step"], gates=names["gates"], raw_gates=(RawGate("beta", "value", "b"),),
        parameter_shapes=lambda head_dim: {"beta_bias": ()},
        init_parameters=lambda heads, head_dim: {"beta_bias": torch.linspace(-2, 2, heads)}, unit_length_keys=False,
    )  # fmt: skip
    rule.check_slices(4, 6, 2)
    with pytest.raises(ValueError, match="--context-parallel-size must be 1 or 2, got 4"):
        rule.check_slices(4, 6, 4)
    torch.manual_seed(0)
    state, k, v, beta = torch.randn(4, 6), torch.randn(4), torch.randn(6), torch.rand(6)
    eps = beta / (1 + beta * (k @ k))
    expected = torch.stack([(1 - eps[j] * k**2) * state[:, j] + eps[j] * k * v[j] for j in range(6)], dim=1)
    got = names["step"](state[None, None], k[None, None], v[None, None], {"beta": beta[None, None]})
    torch.testing.assert_close(got[0, 0], expected)


def without_comments(code: str) -> str:
    """Python code without docstrings, comments and empty lines."""
    lines = re.sub(r'""".*?"""', "", code, flags=re.DOTALL).splitlines()
    return "\n".join(line for line in (re.sub(r"\s+# .*", "", line).rstrip() for line in lines) if line)
