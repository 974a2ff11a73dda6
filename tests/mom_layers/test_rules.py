"""The parts of a rule: a rule that uses every part of the interface, and the parts of the registered rules."""

from dataclasses import replace

import pytest
import torch
import toy_rule
from comparison import relative_error

from mom_layers import MixtureOfMemories, get_rule, rule_names
from mom_layers.hf import MomConfig, MomForCausalLM
from mom_layers.recur.rules import RuleInputs, registry
from mom_layers.reference import mixture_of_memories_reference

HIDDEN, HEADS, K, V = 24, 3, 4, 8


@pytest.fixture
def everything(monkeypatch):
    monkeypatch.setitem(registry._RULES, toy_rule.RULE.name, toy_rule.RULE)
    return toy_rule.RULE


def layer(**changes):
    torch.manual_seed(0)
    sizes = {"num_heads": HEADS, "head_dim": K, "expand_v": V / K, "num_memories": 3, "topk": 2, "rule": "everything"}
    module = MixtureOfMemories(HIDDEN, **(sizes | changes), kernels="torch").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def test_the_layer_follows_the_plain_loop(everything):
    module = layer()
    assert module.q_proj.weight.shape == (K, HIDDEN) and module.k_conv.shape[0] == K
    x = torch.randn(2, 11, HIDDEN, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    out, _ = module(x)
    for sequence, got in zip(x, out, strict=True):
        expected = mixture_of_memories_reference(
            sequence, parameters, num_heads=HEADS, topk=2, shared=True, rule="everything"
        )
        assert relative_error(got, expected) <= 1e-12


def test_decoding_equals_the_whole(everything):
    module = layer()
    x = torch.randn(2, 9, HIDDEN, dtype=torch.float64)
    whole, _ = module(x)
    first, state = module(x[:, :5], output_state=True)
    assert state.recurrent.shape == (2, 4, HEADS, 2 * K, V + 1)
    steps = [module.step(x[:, t], state) for t in range(5, 9)]
    assert relative_error(torch.cat([first, torch.stack(steps, 1)], 1), whole) <= 1e-12


def test_the_initial_states_gradient_takes_values_where_outputs_are_not_linear(everything):
    torch.manual_seed(0)
    ends = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    q, k, v = (torch.randn(9, HEADS, size, dtype=torch.float64).abs() for size in (K, K, V))
    gates = {"g": -torch.rand(9, HEADS, dtype=torch.float64), "bonus": torch.ones(HEADS, dtype=torch.float64)}
    state = torch.rand(3, HEADS, K, V + 1, dtype=torch.float64, requires_grad=True)
    do = torch.randn(9, HEADS, V, dtype=torch.float64)
    inputs = RuleInputs(q, k, v, gates)
    (expected,) = torch.autograd.grad(toy_rule.recur(inputs, ends, state, False, "torch")[0], state, do)
    got = everything.gradient_of_initial_state(inputs, do, ends, state.detach(), "torch")
    assert torch.equal(got, expected)
    without_values = replace(inputs, v=None)
    wrong = everything.gradient_of_initial_state(without_values, do, ends, state.detach(), "torch")
    assert not torch.allclose(wrong, expected)


def test_a_hugging_face_model_of_the_rule(everything, tmp_path):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_heads": HEADS, "head_dim": K, "expand_v": V / K,
             "intermediate_size": 16, "vocab_size": 30, "mom_backend": "everything"}  # fmt: skip
    model = MomForCausalLM(MomConfig(**sizes)).eval()
    assert model.model.layers[0].attn.f_proj[0].weight.shape == (HEADS, HIDDEN)
    model.save_pretrained(tmp_path)
    again = MomForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.arange(12)[None] % 30
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", rule_names())
def test_a_rules_parts_fit_together(name):
    """Shapes and names that other rooms read from the rule, and its loop beside its faster path."""
    rule = get_rule(name)
    assert {p: (HEADS, *s) for p, s in rule.parameter_shapes(16).items()} == {
        p: tuple(value.shape) for p, value in rule.init_parameters(HEADS, 16).items()
    }
    assert len({gate.hf for gate in rule.raw_gates} | {"k", "v", "q", "g", "o"}) == len(rule.raw_gates) + 5
    torch.manual_seed(0)
    q, k, v = (torch.randn(7, HEADS, 16, dtype=torch.float64) for _ in range(3))
    raw = {gate.name: torch.randn(7, HEADS * gate.width(16, 16), dtype=torch.float64) for gate in rule.raw_gates}
    parameters = {p: value.double() for p, value in rule.init_parameters(HEADS, 16).items()}
    ends = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    expected = rule.reference(q, k, v, raw, parameters, ends)
    if rule.unit_length_keys:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    got = rule.recur(rule.prepare(q, k, v, raw, parameters, "torch"), ends, None, True, "torch")
    assert all(relative_error(mine, theirs) <= 1e-9 for mine, theirs in zip(got, expected, strict=True))
