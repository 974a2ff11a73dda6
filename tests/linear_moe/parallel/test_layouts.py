"""Every layout trains as one process does: the losses, every gradient and every parameter."""

import os

import pytest
from conftest import ALONE, EXPERTS, GLA, LAYOUTS, MODELS, ONE_RANK_AN_EXPERT, ROUTED, STEPS, TEXT
from training import CP2, SP, TP2, gradients_of_first_step, launch, parameters

from mom_layers.recur.rules import rule_names

RTOL = 1e-5
ROUNDING = 2e-9
"""Absolute: a gradient that is a sum of large terms may be as small as their rounding, as that of mamba2's D is."""
AFTER_STEPS = 3e-5
"""Of parameters after ten steps: Adam makes a whole step of a rounded gradient near zero."""
DRIFTING = {"rebased": 1e-3}
"""Rules whose losses drift apart, from first gradients that are equal: small denominators enlarge differences."""
UNREAD = {"hgrn2": ("k_conv", "memory_proj.key", "in_proj.weight.key")}
"""Parameters of a layer that a rule does not read, and whose gradients are zero."""


def assert_same(got, expected, rtol=RTOL, unread=()):
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].norm() > 0 or name.endswith(unread), name
        assert (got[name] - expected[name]).norm() <= rtol * expected[name].norm() + ROUNDING, name


@pytest.mark.parametrize(
    "layout,model",
    [(layout, model) for layout in LAYOUTS if layout != "1" for model in (*MODELS, GLA)],
)
def test_ten_steps_equal_one_process(trained, layout, model):
    expected, expected_folder = trained("1", model)
    losses, folder = trained(layout, model)
    assert list(losses) == list(range(1, STEPS + 1)) and losses[STEPS] < losses[1] - 0.2
    rule = str(model).split()[0]
    assert losses == pytest.approx(expected, rel=DRIFTING.get(rule, RTOL))
    found, first = gradients_of_first_step(folder), gradients_of_first_step(expected_folder)
    assert_same(found, first, 2 * RTOL if rule in DRIFTING else RTOL, UNREAD.get(rule, ()))
    if rule not in DRIFTING:
        assert_same(parameters(folder, STEPS), parameters(expected_folder, STEPS), AFTER_STEPS)


EVERY_RULE = rule_names() if os.environ.get("MOM_ALL_LAYOUTS") else []
FEW_LAYOUTS = ("TP2", "EP2", "CP2", "PP2")


@pytest.mark.parametrize("layout", [*FEW_LAYOUTS, "TP2+SP"])
def test_a_rule_alone_equals_one_process(trained, layout):
    test_ten_steps_equal_one_process(trained, layout, ALONE)


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP", "EP2", "CP2", "CP2+TP2+SP"])
def test_a_convolution_over_the_text_equals_one_process(trained, layout):
    test_ten_steps_equal_one_process(trained, layout, TEXT)


@pytest.mark.parametrize("layout", FEW_LAYOUTS)
@pytest.mark.parametrize("model", [f"{rule} {how}" for rule in EVERY_RULE for how in ("alone", "as memories")])
def test_every_rule_equals_one_process(trained, layout, model):
    test_ten_steps_equal_one_process(trained, layout, model)


@pytest.mark.parametrize("layout", ["EP2", "EP2, whole memories", ONE_RANK_AN_EXPERT])
def test_memories_whole_or_split_beside_experts_equal_one_process(trained, layout):
    test_ten_steps_equal_one_process(trained, layout, EXPERTS)


def test_multi_token_prediction_with_sequence_parallelism_equals_one_process(tmp_path):
    data = ["--mock-data", "--train-iters", STEPS, "--mtp-num-layers", 1]
    expected = launch(1, data, tmp_path / "one", save_at=(1,))
    losses = launch(2, [*data, *TP2, *SP], tmp_path / "two", save_at=(1,))
    assert losses == pytest.approx(expected, rel=RTOL)
    assert_same(gradients_of_first_step(tmp_path / "two"), gradients_of_first_step(tmp_path / "one"))


@pytest.mark.parametrize("layout", ["TP2", "TP2+SP"])
@pytest.mark.parametrize("name", ["norm_weight", "router.weight"])
def test_replicated_parameters_get_the_gradient_of_all_heads(trained, layout, name):
    """A rank computes its heads' part of the gradient; the parts are summed (Megatron's issue 7452: are not)."""
    name = f"decoder.layers.self_attention.{name}"
    got = gradients_of_first_step(trained(layout, ROUTED)[1])[name]
    expected = gradients_of_first_step(trained("1", ROUTED)[1])[name]
    assert expected.norm() > 1e-4
    assert (got - expected).norm() <= RTOL * expected.norm()


def cut_as_megatron_does():
    from linear_moe.entry import data

    data.cuts_contiguously = lambda args: False


def test_batches_in_megatrons_order_give_the_same_losses(documents, trained, tmp_path):
    """Megatron's order of tokens, in which softmax layers and Megatron-LM's own scripts give a batch to the ranks."""
    expected, expected_folder = trained("1", ROUTED)

    data = ["--data-path", documents, "--train-iters", STEPS]
    losses = launch(2, [*MODELS[ROUTED], *data, *CP2], tmp_path, save_at=(1,), prepare=cut_as_megatron_does)
    assert losses == pytest.approx(expected, rel=RTOL)
    assert_same(gradients_of_first_step(tmp_path), gradients_of_first_step(expected_folder))
