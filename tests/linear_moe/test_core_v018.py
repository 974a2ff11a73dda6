"""Where core_v0.18 chooses the layers and scales the routers' losses, on stand-ins for its functions."""

import argparse
from types import SimpleNamespace

import pytest
from megatron.training.arguments import add_megatron_arguments

from linear_moe.entry import arguments, core_v018, plugin


def config(token_mixer="mom", experts=None):
    return SimpleNamespace(token_mixer=token_mixer, num_moe_experts=experts, mom_num_memories=4)


def test_layers_are_chosen_where_the_script_builds_its_model(monkeypatch):
    monkeypatch.setattr("linear_moe.layer.specs.mom_block_spec", lambda config, vp_stage: ("memories", vp_stage))

    def build(config, transformer_layer_spec, vp_stage, **keywords):
        return transformer_layer_spec, keywords

    chosen = core_v018._choose_layers(build, config=config(), transformer_layer_spec="softmax", vp_stage=1, seed=7)
    assert chosen == (("memories", 1), {"seed": 7})
    assert core_v018._choose_layers(build, config("attention"), "softmax") == ("softmax", {})


def test_router_losses_are_scaled_without_experts_too():
    def experts_that_are_seen(model, output_tensor, loss_func, config, vp_stage):
        return config.num_moe_experts

    for given, seen in [(config(), 4), (config(experts=8), 8), (config("attention"), None)]:
        before = given.num_moe_experts
        assert core_v018._scale_router_losses(experts_that_are_seen, None, None, None, given, None) == seen
        assert given.num_moe_experts == before


def test_this_megatron_has_its_own_place(monkeypatch):
    assert not core_v018.is_running()
    here = {str(target) for target in plugin.model_patch().targets}
    monkeypatch.setattr(core_v018, "is_running", lambda: True)
    there = {str(target) for target in plugin.model_patch().targets}
    assert there - here == {str(target) for target in core_v018.targets(None)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("hybrid_layer_pattern", "G-", "--hybrid-layer-pattern G- in core_v0.18: .*core_v0.19"),
        ("moe_router_enable_expert_bias", True, "--moe-router-enable-expert-bias in core_v0.18: .*core_v0.19"),
    ],
)
def test_what_it_cannot_do_is_refused(monkeypatch, name, value, message):
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args([])
    args.token_mixer = "mom"
    setattr(args, name, value)
    arguments.check_model(args)
    monkeypatch.setattr(core_v018, "is_running", lambda: True)
    with pytest.raises(ValueError, match=message):
        arguments.check_model(args)
